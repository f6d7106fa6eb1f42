import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.splits import (
    assign_splits,
    check_split,
    count_documents,
    hash_name,
    parse_split,
)


@st.composite
def shares(draw):
    cuts = sorted(draw(st.tuples(st.integers(0, 100), st.integers(0, 100))))
    return (float(cuts[0]), float(cuts[1] - cuts[0]), float(100 - cuts[1]))


@given(shares(), st.integers(3, 5000))
def test_every_split_with_a_share_gets_its_count(percentages, num_documents):
    counts = count_documents(num_documents, percentages)
    assert sum(counts) == num_documents
    for count, percentage in zip(counts, percentages, strict=True):
        assert (count > 0) == (percentage > 0)
        # Rounding moves less than one document to or from each of the three.
        assert abs(count - num_documents * percentage / 100) < 3


@given(st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=50))
def test_assignment_has_the_counts(hashes):
    split_of_document = assign_splits(hashes, (50.0, 25.0, 25.0))
    counts = [int((split_of_document == i).sum()) for i in range(3)]
    assert counts == count_documents(len(hashes), (50.0, 25.0, 25.0))


def test_assignment_follows_the_names_and_not_their_order():
    names = [f"folder/file_{i}.py" for i in range(100)]
    hashes = {name: hash_name(name, 1) for name in names}
    forward = dict(zip(names, assign_splits(list(hashes.values()), (80, 10, 10)), strict=True))
    names.reverse()
    backward = assign_splits([hashes[name] for name in names], (80, 10, 10))
    assert forward == dict(zip(names, backward, strict=True))


def test_hash_is_the_same_on_every_machine():
    # printf '1234\\0asyncio/events.py' | b2sum -l 64, its bytes read as little-endian.
    assert hash_name("asyncio/events.py", 1234) == 15062818976486495780
    assert hash_name("asyncio/events.py", 1235) != hash_name("asyncio/events.py", 1234)
    assert hash_name("not-utf8-\udcff", 0) != hash_name("not-utf8-\udcfe", 0)


def test_split_is_parsed():
    assert parse_split("90,5,5") == (90.0, 5.0, 5.0)
    assert parse_split("99.8, 0.1, 0.1") == (99.8, 0.1, 0.1)
    assert parse_split("100,0,0") == (100.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("90,5", r"--split 90,5: 2 share\(s\), not 3"),
        ("90,5,6", "--split 90,5,6: the shares sum to 101, not 100"),
        ("110,-5,-5", "--split 110,-5,-5: every share must be 0 or more"),
        ("nan,50,50", "--split nan,50,50: every share must be 0 or more"),
        ("inf,0,0", "--split inf,0,0: the shares sum to inf, not 100"),
        ("most,some,rest", "--split most,some,rest: not a list of numbers"),
        ("", "--split : not a list of numbers"),
    ],
)
def test_bad_split_is_refused(text, reason):
    with pytest.raises(PreparationError, match=f"^{reason}: .*such as 90,5,5$"):
        parse_split(text)


def test_check_split_takes_what_an_api_user_gives():
    check_split([50, 25, 25])
    with pytest.raises(PreparationError, match="sum to 99"):
        check_split([50, 25, 24])


def test_too_few_documents_are_refused():
    with pytest.raises(PreparationError, match=r"--split 90,5,5: 2 document\(s\) cannot fill 3"):
        count_documents(2, (90.0, 5.0, 5.0))
    assert count_documents(1, (100.0, 0.0, 0.0)) == [1, 0, 0]
