"""Everything that reads what others wrote, fed with valid files that were damaged: it may refuse, and nothing else.

A *reader* has some valid inputs and a function that reads one. Hypothesis draws which input, and a few damages to it:
of its structure (a value becomes a hostile one, a name goes, two change places) or of its bytes. What a reader raises
beside the errors of the library is a crash; so is an input that takes longer than `LONGEST` seconds.
"""

import json
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from neuroplast.errors import NeuroplastError

LONGEST = 10
Form = Literal["json", "jsonl", "toml", "text", "safetensors"]
Damage = tuple[int, int, int]
"""What is done, where, and with what; each counts round and round what there is."""

DEEP = 1500
HOSTILE: tuple[str, ...] = (
    *[
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "-0.0",
        "0.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1e400",
        "1e308",
        "1e-320",
    ],
    *("9" * 400, "9" * 5000, "-" + "9" * 400, str(2**63), str(2**31), "1000000", "17.5", '""', '" "'),
    *[
        r'"x"',
        r'"\ud800"',
        r'"\u0000"',
        r'"\n\t"',
        r'"../../etc/passwd"',
        r'"/etc/passwd"',
        r'"nan"',
        r'"1e400"',
        r'"base"',
        r'"end"',
    ],
    *['"a0.h0"', '"a0.h0@end"', '"a1.h0->logits"', '"m1"', '"kernels/evil"', '"sdpa"', '"model.safetensors"'],
    *('"' + "long" * 2000 + '"', '"\\u202e<script>"', "[]", "{}", "[[]]", "[null]", "[0]", "[0, 1]"),
    *("[NaN, 1]", "[1, 0]", '{"a": 1, "a": 2}', '{"value": null, "why": 3}', '{"": {}}', '{"mean": 1e308}'),
    *('["a", "a"]', "[[0.0, 0.0]]", "[" * 150 + "]" * 150, "[" * DEEP + "]" * DEEP),
    *('{"a":' * 90 + "1" + "}" * 90, '{"a":' * DEEP + "1" + "}" * DEEP),
)
"""Values, as JSON spells them."""
NAMES: tuple[str, ...] = (
    *("", "x", "end", "a0.h0", "a0.h0<q>@s2", "logits", "m0->logits", "\ud800", "a" * 3000),
    *("neuroplast", "a\nb", "../x", "0"),
)
TOKENS: tuple[bytes, ...] = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", *rb"""" \ { } [ ] , : = -> @ <q>""".split()),
    *(b"a.b.c = 1\n", b"[table]\n", b"[[table]]\n", *rb"""nan inf 1979-05-27T07:32:00Z 12:00:00""".split()),
    *(b"'''", b'"""', b"{a = 1}", b"9" * 5000, b"[" * DEEP, b"a." * 1500, b"\xed\xa0\x80", b"\xe2\x80\xae"),
    *("Ⅷ²٣".encode(), b"+", b" ", b"-1", b"1e400", b"GiB", b"true", b"#", b"(0, 1)"),
    *b"L1H1 each other heads@ all 1.5 e".split(),
)


@dataclass(frozen=True)
class Sample:
    """A valid input."""

    content: bytes
    form: Form
    name: str = ""
    """Which file it is, where a reader has several."""


@dataclass(frozen=True)
class Reader:
    """Something that reads."""

    samples: tuple[Sample, ...]
    read: Callable[[str, bytes], object]
    """Given the name of the sample's file, and what is in it now."""


class Hung(BaseException):
    """An input took too long."""


@dataclass
class Tally:
    """What was fed."""

    fed: int = 0
    refused: int = 0
    distinct: set[int] = field(default_factory=set)
    last: tuple[str, bytes] = ("", b"")


def damaged(sample: Sample, damages: Sequence[Damage]) -> bytes:
    """A sample after some damages: those of its structure first."""
    content = sample.content
    if sample.form == "json":
        content = _change_json(content, damages)
    elif sample.form == "jsonl":
        lines = content.split(b"\n")
        for each in damages:
            row = each[1] % len(lines)
            lines[row] = _change_json(lines[row], [each]) if lines[row] else lines[row]
        content = b"\n".join(lines)
    elif sample.form == "toml":
        content = _change_lines(content, damages)
    elif sample.form == "safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        header = _change_json(content[8 : 8 + length], damages)
        content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    for kind, where, what in damages:
        if kind % 14 >= 8 or sample.form == "text":
            content = _change_bytes(content, kind, where, what)
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with a key or an index of it."""
    inner = [value]
    while inner:
        each = inner.pop()
        for key in each if isinstance(each, dict) else range(len(each)):
            yield each, key
            if isinstance(each[key], dict | list):
                inner.append(each[key])


def _change_json(content: bytes, damages: Sequence[Damage]) -> bytes:
    try:
        return _changed_json(content, damages)
    except (ValueError, RecursionError):
        return content  # an earlier damage has seen to it


def _changed_json(content: bytes, damages: Sequence[Damage]) -> bytes:
    structural = [each for each in damages if each[0] % 14 < 8]
    if not structural:
        return content
    top = [json.loads(content)]
    for kind, where, what in structural:
        found = list(_places(top))
        holder, key = found[where % len(found)]
        hostile = f"@{what % len(HOSTILE)}@"
        other, of = found[what % len(found)]
        match kind % 14:
            case 0 | 1 | 2:
                holder[key] = hostile
            case 3 if holder is not top:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[NAMES[what % len(NAMES)]] = holder.pop(key)
            case 5 if isinstance(holder, dict):
                holder[f"{key}@"] = hostile  # its name twice
            case 6:
                holder[key] = json.loads(json.dumps(other[of])) if isinstance(other[of], dict | list) else other[of]
            case _ if isinstance(holder, list):
                holder.append(hostile)
            case _:
                holder[NAMES[what % len(NAMES)]] = hostile
    text = json.dumps(top[0]).replace('@": ', '": ')
    for number, value in enumerate(HOSTILE):
        if f"@{number}@" in text:
            text = text.replace(f'"@{number}@"', value)
    return text.encode("utf-8", "surrogatepass")


def _change_lines(content: bytes, damages: Sequence[Damage]) -> bytes:
    lines = content.split(b"\n")
    for kind, where, what in damages:
        row = where % len(lines)
        key, equals, _ = lines[row].partition(b" = ")
        token = TOKENS[what % len(TOKENS)]
        match kind % 14:
            case 0 | 1 | 2 if equals:
                value = HOSTILE[what % len(HOSTILE)].encode() if what % 3 else token
                lines[row] = key + equals + value.replace(b"NaN", b"nan").replace(b"Infinity", b"inf")
            case 3 if len(lines) > 1:
                del lines[row]
            case 4:
                lines.insert(row, lines[what % len(lines)])
            case 5 if equals:
                lines[row] = lines[what % len(lines)].partition(b" = ")[0] + lines[row][len(key) :]
            case 6:
                lines.insert(row, token)
            case _:
                pass
    return b"\n".join(lines)


def _change_bytes(content: bytes, kind: int, where: int, what: int) -> bytes:
    at = where % (len(content) + 1)
    to = min(len(content), at + what % 40)
    match kind % 6:
        case 0:
            return content[:at] + bytes([what % 256]) + content[at + 1 :]
        case 1:
            return content[:at] + content[to:]
        case 2:
            return content[:to] + content[at:]
        case 3:
            return content[:at]
        case _:
            return content[:at] + TOKENS[what % len(TOKENS)] + content[at:]


@contextmanager
def limited(seconds: int = LONGEST) -> Iterator[None]:
    """Raises `Hung` inside the block when it takes longer."""

    def ring(number: int, frame: object) -> None:
        raise Hung

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def fuzz(reader: Reader, n: int, tally: Tally, start: int | None = None) -> None:
    """Feeds a reader; the first crash is shrunk and raised, and `tally.last` is then its input.

    Args:
        reader: what is fed.
        n: how many inputs.
        tally: counts them.
        start: of Hypothesis's draws; None draws the same ones every time.
    """

    def feed(drawn: bytes) -> None:
        sample = reader.samples[drawn[0] % len(reader.samples)]
        content = damaged(sample, list(struct.iter_unpack(">BHH", drawn[1 : 1 + (len(drawn) - 1) // 5 * 5])))
        tally.fed += 1
        tally.distinct.add(hash((sample.name, content)))
        tally.last = (sample.name, content)
        try:
            with limited():
                reader.read(sample.name, content)
        except NeuroplastError as error:
            tally.refused += 1
            assert "\n" not in str(error), "an error of several lines"

    run = settings(
        max_examples=n,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        derandomize=start is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(st.binary(min_size=6, max_size=21))(feed))
    (run if start is None else seed(start)(run))()
