"""collecting/prepare.py: e-SNLI's rows."""

import csv

import pytest
from conftest import read_jsonl, refused, write_jsonl


class TestPrepareESNLI:
    def test_original_csv(self, cli, tmp_path):
        """The columns of the files at OanaMariaCamburu/e-SNLI; two files are read one after the other."""
        for k in (1, 2):
            with open(tmp_path / f"{k}.csv", "w", newline="") as f:
                writer = csv.writer(f)
                writer.writerow(["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1", "WorkerId"])
                writer.writerow(
                    [f"p{k}", "neutral", "A {man} sits.", "He, too, waits.", "Sitting is not\nwaiting.", "w"]
                )
        out = tmp_path / "out.jsonl"
        assert (
            cli(
                "collect_candidates",
                "prepare",
                "--task",
                "esnli",
                "--input",
                tmp_path / "1.csv",
                tmp_path / "2.csv",
                "--output",
                out,
            ).code
            == 0
        )
        records = read_jsonl(out)
        assert [r["id"] for r in records] == ["p1", "p2"] and records[0]["label"] == "neutral"
        assert "Premise: A {man} sits.\nHypothesis: He, too, waits." in records[0]["prompt"]
        assert records[0]["candidates"] == [{"text": "Sitting is not\nwaiting. #### Neutral", "source": "human"}]

    def test_skip_limit_and_prompt_file(self, cli, tmp_path):
        rows = [
            {"premise": f"p{i}", "hypothesis": "{premise}", "label": "neutral", "explanation_1": "e"} for i in range(6)
        ]
        source = write_jsonl(tmp_path / "in.jsonl", rows)
        (tmp_path / "t.txt").write_text("<{premise}|{hypothesis}>")
        result = cli(
            "collect_candidates",
            "prepare",
            "--task",
            "esnli",
            "--input",
            source,
            "--output",
            tmp_path / "o.jsonl",
            "--skip",
            2,
            "--limit",
            3,
            "--prompt_file",
            tmp_path / "t.txt",
        )
        assert result.code == 0, result.err
        records = read_jsonl(tmp_path / "o.jsonl")
        assert [r["prompt"] for r in records] == [
            "<p2|{premise}>",
            "<p3|{premise}>",
            "<p4|{premise}>",
        ]  # filled in once
        assert [r["id"] for r in records] == ["esnli-2", "esnli-3", "esnli-4"]

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"label": "maybe"}, ["label", "maybe"]),
            ({"premise": " "}, ["premise"]),
            ({"hypothesis": None}, ["hypothesis"]),
        ],
    )
    def test_bad_rows(self, cli, tmp_path, change, words):
        row = {"premise": "p", "hypothesis": "h", "label": "neutral", "explanation_1": "e"}
        source = write_jsonl(tmp_path / "in.jsonl", [row, row | change])
        result = cli(
            "collect_candidates", "prepare", "--task", "esnli", "--input", source, "--output", tmp_path / "o.jsonl"
        )
        refused(result, "in.jsonl:2", *words)
        assert not (tmp_path / "o.jsonl").exists()

    def test_template_asks_for_what_is_not_there(self, cli, tmp_path):
        (tmp_path / "t.txt").write_text("{premise} {colour}")
        source = write_jsonl(
            tmp_path / "in.jsonl", [{"premise": "p", "hypothesis": "h", "label": "neutral", "explanation": "e"}]
        )
        refused(
            cli(
                "collect_candidates",
                "prepare",
                "--task",
                "esnli",
                "--input",
                source,
                "--prompt_file",
                tmp_path / "t.txt",
                "--output",
                tmp_path / "o.jsonl",
            ),
            "colour",
        )
