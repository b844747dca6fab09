"""SPIN's data: any chats into its format, the opponent's answers shard by shard, and pairs of what belongs together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig

from launch.cli import main
from tests.data.tokenizers_of_kinds import KINDS
from tests.policy.test_load import save_plain
from trainer.data.chat import bare_answer, render, template_identity
from trainer.data.self_play import SpinPairs, SpinRow, chat_source, opponent_of
from trainer.data.tokenize import tokenize_preferences, tokenize_prompt
from trainer.generation import Sampling
from trainer.pairs.self_play import Opponent, Part, generate, read_chats, reformat
from trainer.pairs.self_play_merge import convert
from trainer.policy.load import PolicyConfig, fingerprint, load_frozen, load_tokenizer, saved_policy
from trainer.provenance import write_text
from trainer.schema import UserError

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture
def chats(tmp_path) -> Path:
    """Formatted chats: 24 to train on and 8 to test on."""
    for split, numbers in (("train", range(24)), ("test", range(24, 32))):
        rows = [{"real": turns(f"question {i}", f"answer {i}"), "generated": []} for i in numbers]
        write(tmp_path / "formatted" / f"{split}.jsonl", rows)
    return tmp_path / "formatted"


@pytest.fixture
def opponent(tiny_llama, tmp_path) -> Opponent:
    adapter = save_plain(tiny_llama, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", r=4))
    return Opponent(saved_policy(adapter, str(tiny_llama)), load_tokenizer(str(tiny_llama)))


def answered(opponent: Opponent, chats: Path, output: Path, part: Part = Part(), **settings: Any) -> Any:
    sampling = Sampling(**{"max_new_tokens": 6, "do_sample": True, **settings.pop("sampling", {})})
    load = settings.pop("load", lambda: load_frozen(opponent.config))
    return generate(opponent, load, read_chats(chats), output, sampling, part, **settings)


# --- generate


def test_answers_follow_from_opponent_and_row_alone(opponent, chats, tmp_path):
    whole = answered(opponent, chats, tmp_path / "whole", batch_size=5)
    assert whole["counts"]["train"]["rows"] == 24
    for number in (1, 2, 3):
        answered(opponent, chats, tmp_path / "three", Part(number, 3), batch_size=2)
    for number in range(3):
        answered(opponent, chats, tmp_path / "slices", Part(number, None, 8))
    told = [convert(tmp_path / name, tmp_path / f"{name}-pairs") for name in ("whole", "three", "slices")]
    assert [len(each["shards"]) for each in told] == [1, 3, 3]
    assert told[0]["files"] == told[1]["files"] == told[2]["files"]
    other = answered(opponent, chats, tmp_path / "seed", sampling={"seed": 1})
    assert other["files"] != whole["files"]


def test_a_rerun_asks_for_nothing_and_a_kill_costs_a_batch(opponent, chats, tmp_path):
    def never() -> Any:
        raise AssertionError("nothing is missing")

    whole = answered(opponent, chats, tmp_path / "whole")
    folder = tmp_path / "whole" / "shard-1-of-1"
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    assert answered(opponent, chats, tmp_path / "whole", load=never) == whole
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == before
    part = folder / "parts" / "0.jsonl"
    part.write_bytes(part.read_bytes()[:400])  # as a kill leaves it
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"shard-1-of-1: is not finished; run `tandem spin generate`"):
        convert(tmp_path / "whole", tmp_path / "pairs")
    assert answered(opponent, chats, tmp_path / "whole")["files"] == whole["files"]


def test_other_settings_are_refused_in_a_shard_s_folder(opponent, chats, tmp_path, tiny_llama):
    answered(opponent, chats, tmp_path / "out")
    bare = Opponent(PolicyConfig(str(tiny_llama), None), opponent.tokenizer)
    with pytest.raises(UserError, match=r"made with other settings.*opponent was"):
        answered(bare, chats, tmp_path / "out")
    write(chats / "test.jsonl", [{"real": turns("new", "answer"), "generated": []}])
    with pytest.raises(UserError, match=r"made with other settings.*data was"):
        answered(opponent, chats, tmp_path / "out")


def test_long_prompts_get_no_answer_and_are_counted(opponent, chats, tmp_path):
    rows = [*lines(chats / "train.jsonl"), {"real": turns("w" * 2000, "answer"), "generated": []}]
    write(chats / "train.jsonl", rows)
    counts = answered(opponent, chats, tmp_path / "out")["counts"]["train"]
    assert (counts["rows"], counts["dropped_overlong"]) == (25, 1)
    assert counts["kept"] == 25 - sum(
        counts[f"dropped_{why}"] for why in ("overlong", "empty", "unlearnable")
    )
    assert answered(opponent, chats, tmp_path / "short", max_prompt=3)["counts"]["test"]["kept"] == 0


def test_a_real_answer_that_training_would_stop_at_is_found_before_anything_is_generated(
    opponent, chats, tmp_path, tiny_llama
):
    rows = [*lines(chats / "train.jsonl"), {"real": turns("strike", "</s>out</s>"), "generated": []}]
    write(chats / "train.jsonl", rows)
    counts = answered(opponent, chats, tmp_path / "out")["counts"]["train"]
    assert counts["dropped_unlearnable"] >= 1
    convert(tmp_path / "out", tmp_path / "pairs")
    records = SpinPairs(str(tmp_path / "pairs")).load("train").records
    assert not any("strike" in str(record.prompt) for record in records)
    tokenize_preferences(records, opponent.tokenizer)


def test_an_answer_is_cut_at_the_stop_token_and_says_whether_it_ended(opponent, chats, tmp_path):
    """The tiny model draws its EOS now and then: those answers are finished, and shorter."""
    answered(opponent, chats, tmp_path / "out", sampling={"max_new_tokens": 60, "temperature": 5.0})
    rows = lines(tmp_path / "out" / "shard-1-of-1" / "parts" / "0.jsonl")
    finished = [row for row in rows if row.get("finished")]
    assert finished
    assert all(row["tokens"] < 60 for row in finished)
    assert all(row["tokens"] == 60 for row in rows if row.get("finished") is False)
    for row in lines(tmp_path / "out" / "shard-1-of-1" / "train.jsonl"):
        assert "</s>" not in row["generated"][-1]["content"]
        assert row["generated"][:-1] == row["real"][:-1]


@pytest.mark.parametrize("kind", [*KINDS])
def test_an_answer_rendered_again_has_the_tokens_that_were_drawn(kind):
    """What the template writes around an answer is no part of its words."""
    tokenizer, history = KINDS[kind](), [{"role": "user", "content": "one two"}]
    row = SpinRow("key", history, "three four")
    opening, (closing,) = render(tokenizer, history, [[{"role": "assistant", "content": row.real}]])
    end = tokenizer.eos_token if tokenizer.eos_token in closing else "\n"
    drawn = closing.partition(end)[0]  # as a model that has learned the template draws it, up to its EOS
    assert bare_answer(tokenizer, history, drawn) == row.real
    assert bare_answer(tokenizer, history, "unlike it") == "unlike it"
    assert opening


def test_plain_text_has_no_template_around_it(tiny_gpt2, tmp_path, chats):
    bare = load_tokenizer(str(tiny_gpt2))
    bare.chat_template = None
    config = PolicyConfig(str(tiny_gpt2), None)
    with pytest.raises(UserError, match="no chat template"):
        answered(Opponent(config, bare), chats, tmp_path / "chat")
    plain = Opponent(config, bare, plain=True)
    assert plain.prompt(SpinRow("k", turns("the first half", "")[:1], " the second")) == "the first half"
    answered(plain, chats, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "pairs")
    source = SpinPairs(str(tmp_path / "pairs"))
    source.check_tokenizer(bare)
    records = list(source.load("train").records)
    assert {type(part) for record in records for part in (record.prompt, record.chosen, record.rejected)} == {
        str
    }
    assert tokenize_preferences(records, bare)[0].prompt == tokenize_prompt(records[0].prompt, bare)
    with pytest.raises(UserError, match="a chat begins with 4 turns"):
        plain.prompt(SpinRow("k", CHAT[:-1], "four"))


def test_a_split_without_a_row_has_no_file(opponent, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"prompt": "q", "completion": "a"}])
    (chats / "test.jsonl").write_text("")  # as it was once written
    assert main(["spin", "reformat", "--data", "in.jsonl"]) == 0
    assert [path.name for path in sorted(chats.iterdir())] == ["manifest.json", "train.jsonl"]
    assert "no chat is left to test on, so that formatted has no test.jsonl" in capsys.readouterr().err
    (chats / "manifest.json").unlink()  # a test of one's own
    write(chats / "test.jsonl", [{"real": turns("w" * 400, "answer"), "generated": []}])
    manifest = answered(opponent, chats, tmp_path / "out", max_prompt=40)
    assert (manifest["counts"]["test"]["kept"], [*manifest["files"]]) == (0, ["train.jsonl"])
    assert not (tmp_path / "out" / "shard-1-of-1" / "test.jsonl").exists()
    assert [*convert(tmp_path / "out", tmp_path / "pairs")["files"]] == ["train.jsonl"]


# --- convert


@pytest.fixture
def three(opponent, chats, tmp_path) -> Path:
    for number in (1, 2, 3):
        answered(opponent, chats, tmp_path / "iter0", Part(number, 3))
    return tmp_path / "iter0"


def test_pairs_are_read_as_real_against_generated(three, tmp_path, opponent):
    manifest = convert(three, tmp_path / "pairs")
    source = SpinPairs(str(tmp_path / "pairs"))
    source.check_tokenizer(opponent.tokenizer)
    source.check_reference(fingerprint(opponent.config))
    rows = lines(tmp_path / "pairs" / "train.jsonl")
    records = list(source.load("train").records)
    assert len(records) == len(rows) == manifest["counts"]["train"]["kept"]
    for record, row in zip(records, rows, strict=True):
        assert [*record.prompt, *record.chosen] == row["real"]
        assert [*record.prompt, *record.rejected] == row["generated"]
        assert record.rejected_finished == row["generated_finished"]
    validating = {record.prompt[0]["content"] for record in source.load("validation").records}
    assert validating <= {f"question {i}" for i in range(24, 32)}


def test_generated_that_equals_real_is_dropped_and_counted(three, tmp_path):
    folder = three / "shard-2-of-3"
    rows = lines(folder / "train.jsonl")
    rows[0]["generated"] = rows[0]["real"]
    resealed(folder, rows)
    manifest = convert(three, tmp_path / "pairs")
    counts = manifest["counts"]["train"]
    assert (counts["dropped_identical"], counts["kept"]) == (1, counts["answers"] - 1)
    assert rows[0]["real"] not in [row["real"] for row in lines(tmp_path / "pairs" / "train.jsonl")]


def resealed(folder: Path, rows: list[dict[str, Any]], **changed: Any) -> None:
    """A shard with other rows, or another manifest."""
    from trainer.provenance import sha256_file

    write(folder / "train.jsonl", rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["train.jsonl"] = sha256_file(folder / "train.jsonl")
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changed}))


@pytest.mark.parametrize("written", [0, 1, 2])
def test_convert_killed_between_its_files_and_run_again(written, three, tmp_path, monkeypatch):
    """What lay there of other shards is not taken for whole meanwhile."""
    whole = convert(three, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    of_another_time = {**whole, "shards": []}
    (tmp_path / "killed" / "manifest.json").write_text(json.dumps(of_another_time))
    left = [written]

    def dying(path: Path, text: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write_text(path, text)

    merge = "trainer.pairs.self_play_merge"
    monkeypatch.setattr(f"{merge}.write_text", dying)
    monkeypatch.setattr(f"{merge}.write_manifest", lambda *_: dying(tmp_path / "never", ""))
    with pytest.raises(KeyboardInterrupt):
        convert(three, tmp_path / "killed")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(UserError, match="no pairs of `tandem spin convert`"):
        SpinPairs(str(tmp_path / "killed")).load("train")
    monkeypatch.undo()
    assert convert(three, tmp_path / "killed") == whole
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_a_missing_shard_is_named(three, tmp_path):
    shutil.rmtree(three / "shard-2-of-3")
    with pytest.raises(UserError, match=r"iter0: 1 of 3 shards missing; run .* with --shard 2/3"):
        convert(three, tmp_path / "pairs")


def test_a_shard_that_is_there_twice_is_named(three, tmp_path):
    shutil.copytree(three / "shard-2-of-3", three / "shard-2-copy")
    with pytest.raises(UserError, match=r"shard-2-of-3: is --shard 2/3, and so is .*shard-2-copy"):
        convert(three, tmp_path / "pairs")


def test_a_shard_of_another_opponent_is_named(three, tmp_path, tiny_llama, chats):
    other = save_plain(tiny_llama, tmp_path / "other", IA3Config(task_type="CAUSAL_LM"))
    config = saved_policy(other, str(tiny_llama))
    shutil.rmtree(three / "shard-3-of-3")
    answered(Opponent(config, load_tokenizer(str(tiny_llama))), chats, three, Part(3, 3))
    own = opponent_of(fingerprint(config))["adapter"]
    with pytest.raises(UserError, match=rf"shard-3-of-3: is of another opponent \(adapter {own[:12]}\) than"):
        convert(three, tmp_path / "pairs")


def test_a_shard_of_other_sampling_and_a_changed_one_are_named(three, tmp_path, opponent, chats):
    text = (three / "shard-1-of-3" / "train.jsonl").read_text()
    (three / "shard-1-of-3" / "train.jsonl").write_text(text.replace("question", "quest"))
    with pytest.raises(UserError, match=r"shard-1-of-3/train.jsonl: is not what its manifest.json says"):
        convert(three, tmp_path / "pairs")
    shutil.rmtree(three / "shard-1-of-3")
    answered(opponent, chats, three, Part(1, 3), sampling={"seed": 5})
    with pytest.raises(UserError, match=r"shard-2-of-3: its sampling .* is not that of shard-1-of-3"):
        convert(three, tmp_path / "pairs")
    shutil.rmtree(three / "shard-1-of-3")
    answered(opponent, chats, three, Part(1, 3))
    with pytest.raises(UserError, match=r"--num_fracs 2: .* has shards of 3"):
        convert(three, tmp_path / "pairs", num_fracs=2)


def test_slices_as_published(opponent, chats, tmp_path):
    for number in (0, 1):
        answered(opponent, chats, tmp_path / "iter0", Part(number, None, 10))
    with pytest.raises(UserError, match=r"1 of 3 shards missing; .* --data_frac 2 --frac_len 10"):
        convert(tmp_path / "iter0", tmp_path / "pairs")
    counts = convert(tmp_path / "iter0", tmp_path / "pairs", num_fracs=2)["counts"]["train"]
    assert counts["rows"] == 20
    with pytest.raises(UserError, match=r"frac-9-of-10: has no row, the data has 32"):
        answered(opponent, chats, tmp_path / "iter0", Part(9, None, 10))


def test_the_last_iteration_s_own_pairs_are_mixed_in(opponent, chats, tmp_path, tiny_llama):
    """Of three iterations the third trains on its own and the second's, not on the first's within the second's."""
    convert(answered_into(opponent, chats, tmp_path / "g0"), tmp_path / "d0")
    second = Opponent(PolicyConfig(str(tiny_llama), None), opponent.tokenizer)
    one = convert(answered_into(second, chats, tmp_path / "g1"), tmp_path / "d1", previous=[tmp_path / "d0"])
    third = save_plain(tiny_llama, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM"))
    last = Opponent(saved_policy(third, str(tiny_llama)), opponent.tokenizer)
    two = convert(answered_into(last, chats, tmp_path / "g2"), tmp_path / "d2", previous=[tmp_path / "d1"])
    players = [row["opponent"] for row in lines(tmp_path / "d2" / "train.jsonl")]
    known = [each["opponent"]["digest"][:16] for each in (two, one)]
    assert [players.count(player) for player in known] == [
        two["counts"]["train"]["kept"],
        two["counts"]["train"]["previous"],
    ]
    assert len(players) == sum(players.count(player) for player in known)
    assert {row["opponent"] for row in lines(tmp_path / "d2" / "test.jsonl")} == {known[0]}
    with pytest.raises(
        UserError, match=r"--previous .*d2: is of the same opponent .* changed no weight since"
    ):
        convert(tmp_path / "g2", tmp_path / "d3", previous=[tmp_path / "d2"])


def test_without_a_test_the_newest_opponent_s_answers_alone_validate(opponent, tmp_path, tiny_llama):
    """And no prompt trains in one iteration that validates in another."""
    write(
        tmp_path / "formatted" / "train.jsonl",
        [{"real": turns(f"question {i}", f"answer {i}"), "generated": []} for i in range(120)],
    )
    chats = tmp_path / "formatted"
    convert(answered_into(opponent, chats, tmp_path / "g0"), tmp_path / "d0")
    second = Opponent(PolicyConfig(str(tiny_llama), None), opponent.tokenizer)
    convert(answered_into(second, chats, tmp_path / "g1"), tmp_path / "d1", previous=[tmp_path / "d0"])
    rows = lines(tmp_path / "d1" / "train.jsonl")
    newest = json.loads((tmp_path / "d1" / "manifest.json").read_text())["opponent"]["digest"][:16]
    own = {
        (row["real"][0]["content"], row["generated"][-1]["content"])
        for row in rows
        if row["opponent"] == newest
    }
    assert len(rows) > 1.5 * len(own)
    source = SpinPairs(str(tmp_path / "d1"))
    loaded = source.load("validation")
    said = [(record.prompt[0]["content"], record.rejected[0]["content"]) for record in loaded.records]
    assert said
    assert {*said} <= own
    assert loaded.counts["earlier_iterations"] > 0
    trained = source.load("train").records
    assert not {record.prompt[0]["content"] for record in trained} & {prompt for prompt, _ in said}
    assert {record.rejected[0]["content"] for record in trained} - {answer for _, answer in own}, "both train"


def answered_into(opponent: Opponent, chats: Path, output: Path) -> Path:
    answered(opponent, chats, output)
    return output


# --- what training refuses


def test_another_template_and_another_reference_are_refused(three, tmp_path, opponent, tiny_llama):
    convert(three, tmp_path / "pairs")
    source = SpinPairs(str(tmp_path / "pairs"))
    other = load_tokenizer(str(tiny_llama))
    other.chat_template = other.chat_template.replace("[", "<")
    assert template_identity(other) != template_identity(opponent.tokenizer)
    with pytest.raises(UserError, match="was generated with the chat template"):
        source.check_tokenizer(other)
    with pytest.raises(UserError, match=r"model.reference: is not the opponent.* its adapter is none"):
        source.check_reference(fingerprint(PolicyConfig(str(tiny_llama), None)))


def test_files_that_changed_and_folders_that_are_no_pairs_are_refused(three, chats, tmp_path):
    convert(three, tmp_path / "pairs")
    (tmp_path / "pairs" / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test.jsonl: is not what its manifest.json says"):
        SpinPairs(str(tmp_path / "pairs")).load("train")
    with pytest.raises(UserError, match=r"formatted: no pairs of `tandem spin convert`"):
        SpinPairs(str(chats)).load("train")


def test_chats_that_were_not_written_together_are_refused(tmp_path):
    """A reformat that was killed between its files: the old test may hold what the new train does."""
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "formatted"
    reformat(chat_source(str(tmp_path / "chats.jsonl"), validation_fraction=0.3), folder)
    assert len(read_chats(folder).rows["test"]) + len(read_chats(folder).rows["train"]) == 20
    train = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(train + (folder / "test.jsonl").read_text())
    with pytest.raises(
        UserError, match=r"formatted: its files are not those of its manifest.json; run `tandem spin"
    ):
        read_chats(folder)
    (folder / "manifest.json").unlink()
    assert len(read_chats(folder).rows["train"]) == 20


def test_chats_with_a_broken_line_may_be_dropped(tmp_path):
    rows = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) for n in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join([*rows[:5], '{"prompt": "cut', *rows[5:]]))
    with pytest.raises(UserError, match=r"chats.jsonl:6: not valid JSON"):
        chat_source(str(tmp_path / "chats.jsonl"))
    source = chat_source(str(tmp_path / "chats.jsonl"), broken="drop", empty="drop")
    counts = reformat(source, tmp_path / "formatted", tests=False)["counts"]["train"]
    assert counts["dropped_broken"] == 1
    assert counts["kept"] in (19, 20), "one may be kept to validate on"
