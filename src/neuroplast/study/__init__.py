"""The study: its plan (stages and their settings) and its runner."""

from neuroplast.observer import Observer
from neuroplast.study.outcome import StudyResult
from neuroplast.study.plan import PRESETS, StudyConfig, build_config, build_plan
from neuroplast.study.runner import run_study

__all__ = ["PRESETS", "Observer", "StudyConfig", "StudyResult", "build_config", "build_plan", "run_study"]
