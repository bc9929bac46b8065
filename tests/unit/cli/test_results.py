"""What is printed at the end of tasks evaluate and generate."""

from __future__ import annotations

import json

from cpm_cluster.cli.results import results


def test_an_evaluation_is_a_line_for_each_source_and_file(tmp_path):
    found = {
        "perplexity": [{"source": "/d/e.jsonl", "loss": 2.0, "perplexity": 7.38906, "tokens": 12345}],
        "choices": [
            {
                "file": "/d/c.jsonl",
                "questions": 400,
                "shots": 5,
                "accuracy": 0.5,
                "accuracy_normalised": 0.525,
                "standard_error": 0.025,
            }
        ],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))

    assert list(results(tmp_path)) == [
        "",
        "  perplexity 7.389  /d/e.jsonl (12,345 tokens)",
        "  accuracy 50.0% ± 2.5%, by length 52.5%  /d/c.jsonl (400 questions, 5 shots)",
    ]


def test_of_a_generation_the_place_of_the_answers_is_told_and_of_training_nothing(tmp_path):
    assert list(results(tmp_path)) == []
    (tmp_path / "generated.jsonl").write_text("")
    assert list(results(tmp_path)) == ["", f"  answers: {tmp_path / 'generated.jsonl'}"]
