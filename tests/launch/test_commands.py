"""generate, evaluate, report, inspect, data and export on a tiny model with a trained adapter."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from launch.commands.generate import parser as generate_parser
from launch.models import answering
from launch.sources import text_source
from tests.launch.helpers import fit_config, tandem


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """A run's folder with a trained adapter, and its config."""
    folder = tmp_path_factory.mktemp("trained")
    config = fit_config(folder, tiny_llama, steps=3)
    assert main(["fit", "--config", str(config), "--run", str(folder / "run")]) == 0
    return folder / "run", config


@pytest.fixture(scope="module")
def tiny_llama(models):
    return models("llama")


SHORT = ["--max_new_tokens", "5"]


def test_generate_prints_the_answer_and_nothing_else(trained):
    run, _ = trained
    shown = tandem(["generate", "--adapter", str(run), "--prompt", "coat", *SHORT])
    assert shown.returncode == 0, shown.stderr
    ready = answering(generate_parser().parse_args(["--adapter", str(run)]))
    ids = torch.tensor([ready.tokenizer("Repeat: coat\n").input_ids])
    answer = ready.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert shown.stdout == ready.tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_the_prompt_template_of_the_checkpoint_is_used_unless_raw(trained, capsys):
    run, _ = trained
    answers = []
    for extra in (
        ["--prompt", "coat"],
        ["--raw", "--prompt", "Repeat: coat\n"],
        ["--raw", "--prompt", "coat"],
    ):
        assert main(["generate", "--adapter", str(run), *SHORT, *extra]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_from_stdin(trained, capsys, monkeypatch):
    run, _ = trained
    outputs = []
    for prompt in ("coat", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"coat\n"), encoding="utf-8"))
        assert main(["generate", "--adapter", str(run), "--prompt", prompt, *SHORT]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_conversation_remembers_until_told_to_forget(trained, capsys, monkeypatch):
    run, _ = trained
    answers = []
    for said in ("one\ntwo\n", "one\n/new\ntwo\n/exit\nthree\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        assert main(["generate", "--chat", "--adapter", str(run), "--max_new_tokens", "30"]) == 0
        answers.append(capsys.readouterr().out)
    assert (
        main(["generate", "--chat", "--adapter", str(run), "--prompt", "two", "--max_new_tokens", "30"]) == 0
    )
    alone = capsys.readouterr().out
    assert answers[1].endswith(alone)
    assert not answers[0].endswith(alone)


def test_evaluate_letters_writes_rates_intervals_and_examples(trained, tmp_path, capsys):
    run, _ = trained
    lines, table = tmp_path / "lines.txt", tmp_path / "table.jsonl"
    lines.write_text("The coat cost more\nсорок сорок\nleft out\n", encoding="utf-8")
    table.write_text(json.dumps({"said": "another coat"}) + "\n")
    output = tmp_path / "out.json"
    arguments = ["evaluate", "letters", "--adapter", str(run), "--limit", "2", "--cut", "8", "--full"]
    assert main([*arguments, "--texts", str(lines), "--output", str(output), *SHORT]) == 0
    result = json.loads(output.read_text())
    assert {"substitution_rate", "keep_rate", "substitution_interval", "keep_interval"} <= set(result)
    assert [example["source"] for example in result["examples"]] == ["The coat", "сорок со"]
    assert result["published"]["sentences"] == 5
    assert result["whole_lines"]["sentences"] == 2
    assert "substituted: " in capsys.readouterr().out
    columns = ["--texts", str(table), "--column", "said", "--output", str(output), *SHORT]
    assert main([*arguments, *columns]) == 0
    assert json.loads(output.read_text())["examples"][0]["source"] == "another"


def test_evaluation_texts_of_a_source_are_never_trained_on(trained, tmp_path):
    from launch.commands.evaluate_letters import held_out
    from trainer.pairs.substitution import Letters

    texts = trained[1].parent / "texts.yaml"
    held = set(held_out(str(texts))[0])
    source = text_source(str(texts))
    for stage, kind in (("sft", "demonstration"), ("dpo", "preference")):
        for split in ("train", "validation"):
            seen, _ = Letters(source, kind=kind, stage=stage, validation_fraction=0.5).select(split)
            assert held
            assert not held & {text.text for text in seen}


def test_a_config_s_evaluation_texts_follow_its_own_shares(trained, tmp_path):
    from launch.commands.evaluate_letters import held_out
    from trainer.pairs.substitution import Letters

    _, config = trained
    shares = {"sft": 0.5, "dpo": 0.45, "evaluation": 0.05}
    mine = tmp_path / "mine.yaml"
    content = yaml.safe_load(config.read_text())
    init = content["data"]["init_args"]["source"]["init_args"]
    init |= {"stage_shares": shares, "texts": str(config.parent / "texts.yaml")}
    mine.write_text(yaml.safe_dump(content))
    source = text_source(str(config.parent / "texts.yaml"))
    trains = {
        text.text
        for stage in ("sft", "dpo")
        for split in ("train", "validation")
        for text in Letters(
            source, "demonstration", stage, None, validation_fraction=0.5, stage_shares=shares
        ).select(split)[0]
    }
    held, _ = held_out(str(mine))
    assert held
    assert not trains & set(held)
    assert held == held_out(str(config.parent / "texts.yaml"), shares)[0]
    assert trains & set(held_out(str(config.parent / "texts.yaml"))[0])


def test_sources_of_one_language_are_evaluated_and_shown(tmp_path, capsys):
    from launch.commands.evaluate_letters import held_out

    lines, texts = tmp_path / "ru.txt", tmp_path / "texts.yaml"
    lines.write_text("".join(f"сорок сорок {i}\n" for i in range(100)), encoding="utf-8")
    description = {"class_path": "trainer.data.sources.LineTexts", "init_args": {"ru": str(lines)}}
    texts.write_text(yaml.safe_dump(description))
    held, _ = held_out(str(texts))
    assert held
    assert set(held) <= set(lines.read_text(encoding="utf-8").splitlines())
    assert main(["data", "show", "--texts", str(texts)]) == 0
    assert "kept_en" not in capsys.readouterr().out


def test_shares_without_a_yaml_are_refused(tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("coat\n")
    shares = ["--stage_shares", '{"sft": 0.5, "dpo": 0.2, "evaluation": 0.3}']
    words = ["evaluate", "letters", "--texts", str(lines), "--output", str(tmp_path / "o.json")]
    assert main([*words, *shares]) == 2
    assert "--stage_shares" in capsys.readouterr().err


def test_overlong_texts_are_refused_or_dropped_and_counted(trained, tmp_path, capsys):
    lines, output = tmp_path / "lines.txt", tmp_path / "out.json"
    lines.write_text("coat\n" + "coat " * 100 + "\n")
    words = ["evaluate", "letters", "--texts", str(lines), "--output", str(output), *SHORT]
    words += ["--adapter", str(trained[0])]
    assert main(words) == 2
    assert "text 2" in capsys.readouterr().err
    assert main([*words, "--overlong", "drop"]) == 0
    result = json.loads(output.read_text())
    assert (result["sentences"], result["dropped_overlong"]) == (1, 1)


def test_a_base_that_answers_is_frozen_and_warns_of_nothing(tiny_llama, caplog):
    words = ["--base", str(tiny_llama), "--dtype", "bfloat16", "--prompt", "a"]
    ready = answering(generate_parser().parse_args(words))
    assert not any(parameter.requires_grad for parameter in ready.model.parameters())
    assert not ready.model.training
    assert "train" not in caplog.text


def test_a_wrong_base_is_refused_by_name(trained, tmp_path, capsys):
    from tests import tiny_models

    other = tiny_models.make("llama", tmp_path / "other", seed=5)
    assert main(["generate", "--adapter", str(trained[0]), "--base", str(other), "--prompt", "a"]) == 2
    told = capsys.readouterr().err
    assert "trained on base model" in told
    assert str(other) in told


def test_inspect_shows_tokens_parts_and_counts(trained, capsys):
    _, config = trained
    assert main(["inspect", "--config", str(config), "--index", "1"]) == 0
    shown = capsys.readouterr().out
    assert "prompt + chosen" in shown
    assert "prompt + rejected" in shown
    assert shown.count("BOS once, EOS once") == 2
    assert main(["inspect", "--config", str(config), "--index", "99999"]) == 2
    assert "--index 99999: the train split has examples 0 to" in capsys.readouterr().err


def test_data_show_of_texts_and_of_a_config(trained, tmp_path, capsys):
    _, config = trained
    lines = tmp_path / "lines.txt"
    lines.write_text("The coat\nThe coat\nhm\n")
    assert main(["data", "show", "--texts", str(lines)]) == 0
    shown = capsys.readouterr().out
    assert "dropped_duplicate 1" in shown
    assert "dropped_nothing_to_exchange 1" in shown
    assert "The **со**at" in shown
    assert main(["data", "show", "--config", str(config)]) == 0
    assert "kept_ru" in capsys.readouterr().out
    assert main(["data", "show", "--texts", str(config.parent / "texts.yaml")]) == 0
    assert "test" in capsys.readouterr().out


def test_export_is_the_same_model_and_overwrites_nothing(trained, tmp_path, capsys):
    run, _ = trained
    output = tmp_path / "merged"
    assert main(["export", "--adapter", str(run), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    merged = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.tensor([AutoTokenizer.from_pretrained(output)("coat").input_ids])
    ready = answering(generate_parser().parse_args(["--adapter", str(run)]))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ready.model(ids).logits, atol=1e-5, rtol=1e-5)
    assert main(["export", "--adapter", str(run), "--output", str(output)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_reports_of_one_run_and_of_several(trained, tmp_path, capsys):
    run, _ = trained
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert json.loads((run / "report.json").read_text())["runs"]["run"]["status"] == "finished"
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "report.md").stat().st_size > 100
    capsys.readouterr()
    assert main(["report", str(run), str(run)]) == 2
    assert "--output DIR" in capsys.readouterr().err


def test_a_look_at_data_tells_the_rows_that_are_left_out(trained, tmp_path, capsys):
    _, config = trained
    good = [json.dumps({"prompt": f"p{n}", "chosen": "c", "rejected": "r"}) for n in range(30)]
    lines = [good[0], *good, '{"prompt": "p", "chosen": null, "rejected": "r"}', "no JSON"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {
        "class_path": "trainer.data.preferences.PreferenceFile",
        "init_args": {"path": str(tmp_path / "rows.jsonl"), "broken": "drop", "test_fraction": 0.2},
    }
    words = ["data", "show", "--config", str(config), "--data.source", json.dumps(source)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "\ntest\n" in told
    listed = told.partition("\nleft out\n")[2].splitlines()
    assert listed[0] == f"  {tmp_path / 'rows.jsonl'}, row 2: duplicate"
    assert listed[1].startswith(f"  {tmp_path / 'rows.jsonl'}, row 32: column 'chosen' is missing")
    assert listed[2].startswith(f"  {tmp_path / 'rows.jsonl'}:33: not valid JSON")
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *["no JSON"] * 30]))
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("\n  and 13 more\n")
