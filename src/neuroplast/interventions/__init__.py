"""Interventions on a running model; each module opens with its source, its steps and its sign."""
