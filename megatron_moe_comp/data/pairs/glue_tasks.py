"""The tasks of GLUE as pairs of texts, as T5 was trained on them.

Prefixes, the order of the texts and label words are those of Raffel et al. 2020, appendix D, but
for WNLI: the paper casts it as a question about a pronoun, here it is put as RTE is.
"""

from dataclasses import dataclass

from megatron_moe_comp.data.errors import PreparationError


@dataclass(frozen=True)
class Task:
    """How one task's rows become pairs.

    ``fields`` are the texts in T5's order, each with the columns it may be in. ``labels`` are the
    targets in the order of their numbers, none if the target is a similarity from 0 to 5.
    ``columns`` are those of a TSV file without a header.
    """

    fields: dict[str, tuple[str, ...]]
    labels: tuple[str, ...]
    columns: tuple[str, ...] = ()


_SENTENCE = {"sentence": ("sentence",)}
_SENTENCES = {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")}
_ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    "cola": Task(
        _SENTENCE, ("unacceptable", "acceptable"), columns=("source", "label", "star", "sentence")
    ),
    "sst2": Task(_SENTENCE, ("negative", "positive")),
    "mrpc": Task(_SENTENCES, ("not_equivalent", "equivalent")),
    "qqp": Task(
        {"question1": ("question1",), "question2": ("question2",)}, ("not_duplicate", "duplicate")
    ),
    "stsb": Task(_SENTENCES, ()),
    "mnli": Task(
        {"hypothesis": ("hypothesis", "sentence2"), "premise": ("premise", "sentence1")},
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": Task({"question": ("question",), "sentence": ("sentence",)}, _ENTAILMENT),
    "rte": Task(_SENTENCES, _ENTAILMENT),
    "wnli": Task(_SENTENCES, _ENTAILMENT[::-1]),
}

LABEL_COLUMNS = ("gold_label", "label", "Quality", "is_duplicate", "score")


class Unlabelled(Exception):  # noqa: N818 (it is no error)
    """A row of a test set, whose labels GLUE keeps to itself."""


def convert_row(name: str, row: dict[str, object]) -> tuple[str, str]:
    """The input and target of a row of the task ``name``.

    Raises:
        Unlabelled: the row has no label, or -1.
        PreparationError: the row lacks a text or has no valid label.
    """
    task = TASKS[name]
    parts = [name]
    for field, columns in task.fields.items():
        text = next((row[column] for column in columns if column in row), None)
        if not isinstance(text, str) or not text.strip():
            raise PreparationError(f"no text in {' or '.join(map(repr, columns))}")
        parts.append(f"{field}: {text.strip()}")
    label = next((row[column] for column in LABEL_COLUMNS if column in row), None)
    if label is None or str(label) == "-1" or label == -1:
        raise Unlabelled
    return " ".join(parts), _format_label(task, label)


def _format_label(task: Task, label: object) -> str:
    if task.labels:
        if isinstance(label, str) and label in task.labels:
            return label
        if str(label).isdecimal() and int(str(label)) < len(task.labels):
            return task.labels[int(str(label))]
        allowed = f"{', '.join(task.labels)} or its number from 0 up"
    else:
        try:
            # To the nearest 0.2, which makes the similarity one of 26 words.
            similarity = round(float(str(label)) * 5) / 5
            if 0 <= similarity <= 5:
                return f"{similarity:.1f}"
        except (ValueError, OverflowError):
            pass
        allowed = "a similarity from 0 to 5"
    raise PreparationError(f"the label {label!r} is not {allowed}")
