"""A lesson's `interview.toml`: its schema, its errors, and how a notebook shows it.

    frequency = "how often and in what form it comes up, as our judgement"
    frequency_zh = "…"                       # optional, like every other key that ends in _zh

    [question]
    en = "…"
    zh = "…"

    [answers]                                # spoken, as Markdown
    one_minute = "…"
    five_minutes = "…"
    one_minute_zh = "…"                      # optional
    five_minutes_zh = "…"                    # optional

    [[followups]]                            # one or more, easiest first
    question_en = "…"
    question_zh = "…"
    strong = "what a strong answer contains"
    weak = "what a weak one says"
    strong_zh = "…"                          # optional
    weak_zh = "…"                            # optional

    [[rubric]]                               # one or more
    points = 2
    criterion = "what earns them"
    criterion_zh = "…"                       # optional

Where a Chinese text is missing, the Chinese notebook shows the English one.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse.leaks import LessonError

HEADINGS = {
    "en": {
        "question": "Question",
        "other": "问题",
        "frequency": "How often",
        "one_minute": "In one minute",
        "five_minutes": "In five minutes",
        "followups": "Follow-ups",
        "answers": "A strong answer and a weak one",
        "strong": "Strong",
        "weak": "Weak",
        "rubric": "How an answer is scored",
        "points": "points",
        "criterion": "for",
    },
    "zh": {
        "question": "问题",
        "other": "Question",
        "frequency": "出现频率",
        "one_minute": "一分钟回答",
        "five_minutes": "五分钟回答",
        "followups": "追问",
        "answers": "好的回答与差的回答",
        "strong": "好",
        "weak": "差",
        "rubric": "评分标准",
        "points": "分",
        "criterion": "要点",
    },
}


@dataclass(frozen=True)
class Text:
    """The same words in two languages."""

    en: str
    zh: str

    def of(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class Followup:
    """A question an interviewer asks next, with what a strong and a weak answer say."""

    question: Text
    strong: Text
    weak: Text


@dataclass(frozen=True)
class Criterion:
    """One line of the rubric: what earns how many points."""

    points: int
    criterion: Text


@dataclass(frozen=True)
class Interview:
    """What a lesson prepares for: the question, two spoken answers, the ladder of follow-ups, the rubric."""

    question: Text
    frequency: Text
    one_minute: Text
    five_minutes: Text
    followups: tuple[Followup, ...]
    rubric: tuple[Criterion, ...]


def read_interview(path: Path) -> Interview:
    """Read and validate an `interview.toml`; LessonError names the file, the line and the key."""
    text = path.read_text(encoding="utf-8")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise LessonError(
            path, int(line[1]) if line else text.count("\n") + 1, f"not TOML: {error}"
        ) from error
    top = _Table(path, text, document)
    top.only({"frequency", "frequency_zh", "question", "answers", "followups", "rubric"})
    question = top.table("question", {"en", "zh"})
    answers = top.table("answers", {"one_minute", "five_minutes"})
    followups = top.tables("followups", {"question_en", "question_zh", "strong", "weak"})
    rubric = top.tables("rubric", {"points", "criterion"})
    return Interview(
        question=Text(question.words("en"), question.words("zh")),
        frequency=top.both("frequency"),
        one_minute=answers.both("one_minute"),
        five_minutes=answers.both("five_minutes"),
        followups=tuple(
            Followup(
                question=Text(entry.words("question_en"), entry.words("question_zh")),
                strong=entry.both("strong"),
                weak=entry.both("weak"),
            )
            for entry in followups
        ),
        rubric=tuple(Criterion(entry.whole("points"), entry.both("criterion")) for entry in rubric),
    )


@dataclass(frozen=True)
class _Table:
    """A TOML table with where it stands, for errors that name the line."""

    path: Path
    text: str
    values: Mapping[str, Any]
    name: str = ""
    index: int = 0

    def fail(self, key: str, message: str) -> LessonError:
        return LessonError(
            self.path, self._line(key), f"{message} (its schema: llmcourse/interview_source.py)"
        )

    def _line(self, key: str) -> int:
        lines = self.text.splitlines()
        headers = [
            at for at, line in enumerate(lines) if re.match(rf"\s*\[+\s*{re.escape(self.name)}\s*\]", line)
        ]
        first = headers[self.index] if self.name and self.index < len(headers) else 0
        wanted = re.escape(key)
        keys = rf"\s*(?:(?:{re.escape(self.name)}\.)?{wanted}\s*=|\[+\s*{wanted}\s*\])"
        found = (at for at in range(first, len(lines)) if re.match(keys, lines[at]))
        return next(found, first) + 1

    def only(self, known: set[str]) -> None:
        unknown = sorted(set(self.values) - known)
        if unknown:
            listed = ", ".join(sorted(known))
            raise self.fail(unknown[0], f"unknown key {unknown[0]!r} in {self._place()}; known: {listed}")

    def _place(self) -> str:
        return f"[{self.name}]" if self.name else "the file"

    def table(self, name: str, required: set[str]) -> _Table:
        found = self.values.get(name)
        if not isinstance(found, dict):
            raise self.fail(name, f"expected a table [{name}], found {_kind(found)}")
        table = _Table(self.path, self.text, found, name)
        table.only(required | {f"{key}_zh" for key in required if not key.startswith(("en", "zh"))})
        return table

    def tables(self, name: str, required: set[str]) -> list[_Table]:
        found = self.values.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
            raise self.fail(name, f"expected one or more tables [[{name}]], found {_kind(found)}")
        tables = [_Table(self.path, self.text, entry, name, index) for index, entry in enumerate(found)]
        translated = {f"{key}_zh" for key in required if key in ("strong", "weak", "criterion")}
        for table in tables:
            table.only(required | translated)
        return tables

    def words(self, key: str) -> str:
        found = self.values.get(key)
        if not isinstance(found, str) or not found.strip():
            raise self.fail(key, f"expected a text as {key!r} in {self._place()}, found {_kind(found)}")
        return found.strip()

    def both(self, key: str) -> Text:
        english = self.words(key)
        return Text(english, self.words(f"{key}_zh") if f"{key}_zh" in self.values else english)

    def whole(self, key: str) -> int:
        found = self.values.get(key)
        if type(found) is not int or found <= 0:
            raise self.fail(
                key, f"expected a whole number above 0 as {key!r} in {self._place()}, found {found!r}"
            )
        return found


def _kind(found: object) -> str:
    return "nothing" if found is None else f"{type(found).__name__} {found!r}"[:60]


# ---------------------------------------------------------------------------------------------------- as Markdown


def question_markdown(interview: Interview, *, language: str) -> str:
    """The question in both languages, the notebook's first, and how often it comes up."""
    words, other = HEADINGS[language], "en" if language == "zh" else "zh"
    lines = [
        f"**{words['question']}.** {_inline(interview.question.of(language))}",
        f"**{words['other']}.** {_inline(interview.question.of(other))}",
        f"*{words['frequency']}:* {_inline(interview.frequency.of(language))}",
    ]
    return "\n>\n".join(f"> {line}" for line in lines)


def interview_markdown(interview: Interview, *, language: str) -> list[str]:
    """The answers, the follow-ups and the rubric, each folded: one Markdown cell apiece."""
    words = HEADINGS[language]
    answers = "\n\n".join(
        _folded(words[name], getattr(interview, name).of(language)) for name in ("one_minute", "five_minutes")
    )
    ladder = [f"### {words['followups']}"]
    for number, followup in enumerate(interview.followups, 1):
        other = followup.question.of("en" if language == "zh" else "zh")
        strong, weak = (
            f"**{words[kind]}.** {getattr(followup, kind).of(language)}" for kind in ("strong", "weak")
        )
        ladder.append(f"**{number}. {_inline(followup.question.of(language))}**  \n{_inline(other)}")
        ladder.append(_folded(words["answers"], f"{strong}\n\n{weak}"))
    table = [f"| {words['points']} | {words['criterion']} |", "|---:|---|"]
    for line in interview.rubric:
        criterion = _inline(line.criterion.of(language)).replace("|", r"\|")
        table.append(f"| {line.points} | {criterion} |")
    return [answers, "\n\n".join(ladder), _folded(words["rubric"], "\n".join(table))]


def _folded(summary: str, body: str) -> str:
    """A folded block; the blank lines make Jupyter and GitHub render the Markdown inside."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def _inline(text: str) -> str:
    return " ".join(text.split())
