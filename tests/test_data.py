import json

import pytest

from compress import data
from compress.data import Document, Request, split
from compress.errors import Corrupt, RecipeError

ALL = [Request("calibration", "wiki", 1000), Request("selection", "wiki"), Request("evaluation", "wiki")]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"


def text(word: str, count: int = 20) -> str:
    return " ".join(f"{word}{i}" for i in range(count))


def test_splits_are_disjoint_seeded_and_cover_the_source():
    parts = split(ALL, seed=0)
    ids = [{d.id for d in part.documents} | set(part.dropped) for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids)) == len(data.documents("wiki"))
    assert len(parts[2].documents) == pytest.approx(0.5 * sum(map(len, ids)), rel=0.05)
    again, other = split(ALL, seed=0), split(ALL, seed=1)
    assert [p.digest for p in again] == [p.digest for p in parts]
    assert [p.digest for p in other] != [p.digest for p in parts]
    order = [d.id for d in parts[2].documents]
    assert order != sorted(order)


def test_a_source_with_one_role_is_used_whole():
    (part,) = split([Request("evaluation", "pydoc")], 0)
    found = data.documents("pydoc")
    texts = {d.id: d.text for d in found}
    assert {d.id for d in part.documents} | {*part.dropped} == texts.keys()
    assert len(part.documents) == len({*texts.values()})  # some of its topics have one text


def test_overlap_within_a_source_is_dropped_and_listed(tmp_path):
    rows = [{"id": f"d{i}", "text": text(f"w{i}x")} for i in range(60)]
    rows += [{"id": f"copy{i}", "text": "start " + text(f"w{i}x")} for i in range(60)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    calibration, evaluation = split([Request("calibration", source), Request("evaluation", source)], 0)
    grams = set().union(*(data._ngrams(d.text) for d in evaluation.documents))
    assert calibration.dropped and not any(data._ngrams(d.text) & grams for d in calibration.documents)


def test_short_texts_overlap_where_they_are_equal(tmp_path):
    rows = [{"id": f"d{i}{half}", "text": f"Question {i}  is short"} for i in range(60) for half in "ab"]
    rows += [{"id": f"other{i}", "text": f"question {i} is short, too"} for i in range(60)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    calibration, evaluation = split([Request("calibration", source), Request("evaluation", source)], 0)
    asked = [d.text for d in evaluation.documents]
    assert calibration.dropped and not {d.text for d in calibration.documents} & {*asked}
    assert all(name.startswith("d") for name in calibration.dropped)  # a text that begins like another one is not equal
    a = write_rows(tmp_path / "b.jsonl", [{"id": "left", "text": "the same"}])
    b = write_rows(tmp_path / "c.jsonl", [{"id": "right", "text": "The  same"}])
    with pytest.raises(RecipeError, match=r"'left' repeats all 2 words of .*'right'"):
        split([Request("calibration", a), Request("evaluation", b)], 0)


@pytest.mark.parametrize("role", ["evaluation", "holdout"])
def test_a_text_is_evidence_once(tmp_path, role):
    rows = [{"id": f"d{i}", "text": text(f"w{i % 20}x") + ("\n" if i % 2 else " ")} for i in range(60)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    (part,) = split([Request(role, source)], 0)
    assert len(part.documents) == len({d.text.strip() for d in part.documents}) == 20 and len(part.dropped) == 40
    assert {d.id for d in part.documents} | {*part.dropped} == {row["id"] for row in rows}
    (calibration,) = split([Request("calibration", source)], 0)
    assert len(calibration.documents) == 60 and not calibration.dropped  # it is no evidence
    once = write_rows(tmp_path / "a.jsonl", [row for row in rows if row["id"] not in part.dropped])
    (again,) = split([Request(role, once)], 0)
    assert again.digest == part.digest  # what is left out decides nothing


def test_overlap_across_sources_names_both_rows(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [{"id": "left", "text": text("same")}])
    b = write_rows(tmp_path / "b.jsonl", [{"id": "right", "text": "then " + text("same")}])
    with pytest.raises(RecipeError, match=r"'left' repeats 13 words .*'right'"):
        split([Request("calibration", a), Request("evaluation", b)], 0)


@pytest.mark.parametrize(
    "content,kind,message",
    [
        ("", RecipeError, "is empty"),
        ('{"text": "  "}\n', RecipeError, "is empty"),
        ('{"id": 1}\n', RecipeError, r":1: expected a JSON object"),
        ('{"text": "a"}\nnot json\n', RecipeError, ":2: expected"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', RecipeError, "occur twice"),
        (b"\xff\xfe", Corrupt, "not UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, kind, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message):
        data.documents(f"file:{path}")


def test_missing_and_unknown_sources_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        data.documents(f"file:{tmp_path / 'none.txt'}")
    with pytest.raises(RecipeError, match="unknown data source 'wikki'"):
        data.documents("wikki")


def test_plain_text_is_cut_into_contiguous_blocks(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"word{i} " for i in range(5000)))
    blocks = data.documents(f"file:{path}")
    assert len(blocks) > 3 and "".join(b.text for b in blocks) == path.read_text()
    assert all(len(b.text) <= data.BLOCK_CHARACTERS for b in blocks)


def test_packing_fills_windows_within_the_budget():
    part = data.Split(Request("calibration", "x", tokens=20, length=8), (Document("a", "abcdefg"),) * 9, (), "d")
    windows = data.pack(part, lambda s: [ord(c) for c in s], separator=0)
    assert [len(w) for w in windows] == [8, 8]
    assert windows[0].tolist() == [*map(ord, "abcdefg"), 0]
    short = data.Split(Request("calibration", "x", tokens=5, length=8), part.documents, (), "d")
    with pytest.raises(RecipeError, match="fill no window"):
        data.pack(short, lambda s: [ord(c) for c in s], separator=0)
