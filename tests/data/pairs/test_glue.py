import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.pairs.glue import convert_task, main
from megatron_moe_comp.data.pairs.glue_tasks import TASKS, convert_row

# Two rows each as GLUE distributes them: header (CoLA has none), rows, header and row of test.tsv.
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
MNLI += " sentence2_parse sentence1 sentence2"
TSV = {
    "cola": ("", ["gj04|1||One \"quoted.", "ks08|0|*|Two the."], "index|sentence", "0|T."),
    "sst2": ("sentence|label", ["a fine film |1", "dull |0"], "index|sentence", "0|t"),
    "mrpc": (
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        ["1|70|71|\"One, he said.|Said he.", "0|72|73|A.|B."],
        "index|#1 ID|#2 ID|#1 String|#2 String",
        "0|1|2|T.|U.",
    ),
    "qqp": (
        "id|qid1|qid2|question1|question2|is_duplicate",
        ["0|1|2|Why?|Why so?|1", "1|3|4|Who?|When?|0"],
        "id|question1|question2",
        "0|T?|U?",
    ),
    "stsb": (
        "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
        ["0|g|f|2012|1|none|none|A plane.|A jet.|4.750", "1|g|f|2012|2|none|none|A.|B.|0.000"],
        "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2",
        "0|g|f|2012|1|none|none|T.|U.",
    ),
    "mnli": (
        MNLI.replace(" ", "|") + "|label1|gold_label",
        ["0|1|2|g|( a )|( b )|(R)|(R)|A premise.|It follows.|neutral|entailment",
         "1|1|2|g|( a )|( b )|(R)|(R)|Rain.|Sun.|neutral|contradiction"],
        MNLI.replace(" ", "|"),
        "0|1|2|g|( a )|( b )|(R)|(R)|T.|U.",
    ),
    "qnli": (
        "index|question|sentence|label",
        ["0|Who?|He.|entailment", "1|Why?|It rained.|not_entailment"],
        "index|question|sentence",
        "0|T?|U.",
    ),
    "rte": (
        "index|sentence1|sentence2|label",
        ["0|A.|B.|not_entailment", "1|C.|D.|entailment"],
        "index|sentence1|sentence2",
        "0|T.|U.",
    ),
    "wnli": (
        "index|sentence1|sentence2|label",
        ["0|He fell.|Bob fell.|1", "1|C.|D.|0"],
        "index|sentence1|sentence2",
        "0|T.|U.",
    ),
}  # fmt: skip

# The same rows as Hugging Face names their columns and numbers their labels.
ROWS = {
    "cola": [{"sentence": "One \"quoted.", "label": 1}, {"sentence": "Two the.", "label": 0}],
    "sst2": [{"sentence": "a fine film ", "label": 1}, {"sentence": "dull ", "label": 0}],
    "mrpc": [
        {"sentence1": "\"One, he said.", "sentence2": "Said he.", "label": 1},
        {"sentence1": "A.", "sentence2": "B.", "label": 0},
    ],
    "qqp": [
        {"question1": "Why?", "question2": "Why so?", "label": 1},
        {"question1": "Who?", "question2": "When?", "label": 0},
    ],
    "stsb": [
        {"sentence1": "A plane.", "sentence2": "A jet.", "label": 4.75},
        {"sentence1": "A.", "sentence2": "B.", "label": 0.0},
    ],
    "mnli": [
        {"premise": "A premise.", "hypothesis": "It follows.", "label": 0},
        {"premise": "Rain.", "hypothesis": "Sun.", "label": 2},
    ],
    "qnli": [
        {"question": "Who?", "sentence": "He.", "label": 0},
        {"question": "Why?", "sentence": "It rained.", "label": 1},
    ],
    "rte": [
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        {"sentence1": "C.", "sentence2": "D.", "label": 0},
    ],
    "wnli": [
        {"sentence1": "He fell.", "sentence2": "Bob fell.", "label": 1},
        {"sentence1": "C.", "sentence2": "D.", "label": 0},
    ],
}  # fmt: skip

PAIRS = {
    "cola": [
        ("cola sentence: One \"quoted.", "acceptable"),
        ("cola sentence: Two the.", "unacceptable"),
    ],
    "sst2": [("sst2 sentence: a fine film", "positive"), ("sst2 sentence: dull", "negative")],
    "mrpc": [
        ("mrpc sentence1: \"One, he said. sentence2: Said he.", "equivalent"),
        ("mrpc sentence1: A. sentence2: B.", "not_equivalent"),
    ],
    "qqp": [
        ("qqp question1: Why? question2: Why so?", "duplicate"),
        ("qqp question1: Who? question2: When?", "not_duplicate"),
    ],
    "stsb": [
        ("stsb sentence1: A plane. sentence2: A jet.", "4.8"),
        ("stsb sentence1: A. sentence2: B.", "0.0"),
    ],
    "mnli": [
        ("mnli hypothesis: It follows. premise: A premise.", "entailment"),
        ("mnli hypothesis: Sun. premise: Rain.", "contradiction"),
    ],
    "qnli": [
        ("qnli question: Who? sentence: He.", "entailment"),
        ("qnli question: Why? sentence: It rained.", "not_entailment"),
    ],
    "rte": [
        ("rte sentence1: A. sentence2: B.", "not_entailment"),
        ("rte sentence1: C. sentence2: D.", "entailment"),
    ],
    "wnli": [
        ("wnli sentence1: He fell. sentence2: Bob fell.", "entailment"),
        ("wnli sentence1: C. sentence2: D.", "not_entailment"),
    ],
}  # fmt: skip


def write_tsv(path, *lines):
    path.write_bytes("".join(line.replace("|", "\t") + "\r\n" for line in lines if line).encode())


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(prefix, split):
    path = prefix.with_name(f"{prefix.name}_{split}.jsonl")
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    return [(pair["input"], pair["target"]) for pair in pairs]


def write_task(folder, name, form):
    """A directory of GLUE's or Hugging Face's files: both rows, the second, an unlabelled one."""
    matched = "_matched" if name == "mnli" else ""
    if form == "tsv":
        header, rows, test_header, test_row = TSV[name]
        write_tsv(folder / "train.tsv", header, *rows)
        write_tsv(folder / f"dev{matched}.tsv", header, rows[1])
        write_tsv(folder / f"test{matched}.tsv", test_header, test_row)
    else:
        write_jsonl(folder / "train.jsonl", *ROWS[name])
        write_jsonl(folder / f"validation{matched}.jsonl", ROWS[name][1])
        write_jsonl(folder / f"test{matched}.jsonl", ROWS[name][0] | {"label": -1})


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_in_both_forms(name, form, tmp_path, capsys):
    write_task(tmp_path, name, form)
    prefix = tmp_path / "out" / name
    arguments = ["--task", name, "--input", str(tmp_path), "--output-prefix", str(prefix)]
    assert main(arguments) == 0
    assert read(prefix, "train") == PAIRS[name]
    assert read(prefix, "valid") == PAIRS[name][1:]
    assert len(list(prefix.parent.iterdir())) == 2
    summary = capsys.readouterr().out
    assert "train: 2 pairs from" in summary
    assert "left out: 1 rows without a label" in summary
    assert f"--train-data-path {prefix}_train.jsonl --valid-data-path {prefix}_valid" in summary
    assert "--test-data-path" not in summary


def test_label_words_are_taken_as_numbers_are(tmp_path):
    rows = [row | {"label": target} for row, (_, target) in zip(ROWS["qqp"], PAIRS["qqp"])]  # noqa: B905
    assert [convert_row("qqp", row) for row in rows] == PAIRS["qqp"]
    assert convert_row("rte", ROWS["rte"][0] | {"label": "1"}) == PAIRS["rte"][0]


@given(st.floats(0, 5))
def test_similarity_is_one_of_26_words_and_the_nearest(similarity):
    _, target = convert_row("stsb", {"sentence1": "A", "sentence2": "B", "label": similarity})
    assert target in {f"{i // 5}.{i % 5 * 2}" for i in range(26)}
    assert abs(float(target) - similarity) <= 0.1 + 1e-9


def test_original_mrpc_files_and_a_mark_are_read(tmp_path):
    header, rows, *_ = TSV["mrpc"]
    write_tsv(tmp_path / "msr_paraphrase_train.txt", "\ufeff" + header, *rows)
    write_tsv(tmp_path / "msr_paraphrase_test.txt", "\ufeff" + header, rows[1])
    convert_task("mrpc", tmp_path, tmp_path / "mrpc", skip_bad_rows=False)
    assert read(tmp_path / "mrpc", "train") == PAIRS["mrpc"]
    assert read(tmp_path / "mrpc", "test") == PAIRS["mrpc"][1:]


def test_mismatched_mnli_is_a_file_of_its_own(tmp_path):
    write_task(tmp_path, "mnli", "tsv")
    header, rows, *_ = TSV["mnli"]
    # The annotators' labels differ in number from those of the training file.
    longer = header.replace("label1", "label1|label2")
    write_tsv(tmp_path / "dev_mismatched.tsv", longer, rows[0].replace("neutral", "neutral|x"))
    lines = convert_task("mnli", tmp_path, tmp_path / "mnli", skip_bad_rows=False)
    assert read(tmp_path / "mnli", "valid") == PAIRS["mnli"][1:]
    assert read(tmp_path / "mnli", "valid_mismatched") == PAIRS["mnli"][:1]
    assert lines[-1] == f"also written: {tmp_path}/mnli_valid_mismatched.jsonl"


def test_earlier_splits_do_not_stay(tmp_path):
    write_task(tmp_path, "rte", "jsonl")
    write_jsonl(tmp_path / "test.jsonl", *ROWS["rte"])
    convert_task("rte", tmp_path, tmp_path / "rte", skip_bad_rows=False)
    assert read(tmp_path / "rte", "test") == PAIRS["rte"]
    (tmp_path / "test.jsonl").unlink()
    convert_task("rte", tmp_path, tmp_path / "rte", skip_bad_rows=False)
    assert not (tmp_path / "rte_test.jsonl").exists()


BAD_TSV = {
    b"0\tA.\tB.": "3 columns, not 4",
    b"0\tA.\tB.\t1\tmore": "5 columns, not 4",
    b"0\t \tB.\tentailment": "no text in 'sentence1' or '#1 String'",
    b"0\tA.\tB.\tmaybe": "the label 'maybe' is not entailment, not_entailment or its number",
    b"0\tA.\tB.\t2": "the label '2' is not entailment",
    b"0\tA.\tB.\t-1": "no label",
    b"0\tA\xff\tB.\tentailment": "byte 3 (0xff) is not UTF-8",
}
BAD_JSONL = {
    b"{": "not JSON",
    b'["A."]': "a JSON list, not an object",
    b'{"sentence1": "A.", "label": 0}': "no text in 'sentence2'",
    b'{"sentence1": 5, "sentence2": "B.", "label": 0}': "no text in 'sentence1'",
    b'{"sentence1": "A.", "sentence2": "B.", "label": true}': "the label True is not",
    b'{"sentence1": "A.", "sentence2": "B.", "label": null}': "no label",
}


@pytest.mark.parametrize(
    ("form", "line", "reason"),
    [("tsv", *item) for item in BAD_TSV.items()] + [("jsonl", *item) for item in BAD_JSONL.items()],
)
def test_bad_row_is_refused_or_left_out(form, line, reason, tmp_path, capsys):
    write_task(tmp_path, "rte", form)
    path = tmp_path / f"train.{form}"
    path.write_bytes(path.read_bytes() + line + b"\n")
    number = 4 if form == "tsv" else 3
    arguments = ["--task", "rte", "--input", str(tmp_path)]
    arguments += ["--output-prefix", str(tmp_path / "rte")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"glue: error: {path}: 1 of 3 rows are bad: line {number}: {reason}" in error
    assert "--skip-bad-rows" in error
    assert not list(tmp_path.glob("rte*"))
    assert main([*arguments, "--skip-bad-rows"]) == 0
    assert f"left out: 1 bad rows: line {number}: {reason}" in capsys.readouterr().out
    assert read(tmp_path / "rte", "train") == PAIRS["rte"]


@pytest.mark.parametrize("label", ["5.2", "-0.5", "nan", "inf", "much"])
def test_similarity_out_of_range_is_bad(label):
    with pytest.raises(PreparationError, match="is not a similarity from 0 to 5"):
        convert_row("stsb", {"sentence1": "A", "sentence2": "B", "score": label})


def test_what_is_no_task_is_refused(tmp_path):
    with pytest.raises(PreparationError, match=r"has no train\.tsv or train\.jsonl"):
        convert_task("rte", tmp_path, tmp_path / "out", skip_bad_rows=False)
    write_task(tmp_path, "rte", "tsv")
    with pytest.raises(PreparationError, match=r"2 of 2 rows are bad: line 2: no text in 'quest"):
        convert_task("qqp", tmp_path, tmp_path / "out", skip_bad_rows=False)
    with pytest.raises(PreparationError, match=r"train\.tsv: has no usable row"):
        convert_task("qqp", tmp_path, tmp_path / "out", skip_bad_rows=True)
    (tmp_path / "train.tsv").write_bytes(b"")
    with pytest.raises(PreparationError, match=r"no usable row \(it is empty\)"):
        convert_task("rte", tmp_path, tmp_path / "out", skip_bad_rows=False)
