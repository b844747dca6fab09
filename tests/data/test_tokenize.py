"""Records to token ids: BOS and EOS once, a boundary that never merges, and lengths by the stated rule."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.tokenizers_of_kinds import KINDS
from trainer.data.tokenize import (
    Limits,
    TokenCounts,
    tokenize_demonstrations,
    tokenize_preferences,
    tokenize_prompt,
)
from trainer.schema import (
    Demonstration,
    Message,
    Preference,
    TokenizedDemonstration,
    TokenizedPreference,
    UserError,
)

MADE = {kind: make() for kind, make in KINDS.items()}
PLAIN = st.text(
    st.sampled_from("the coat\n:.сорок <s>/|imendotx_") | st.characters(codec="utf-8"), max_size=30
)


@pytest.fixture(params=sorted(MADE))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MADE[request.param]


def pair(prompt: object, chosen: object, rejected: object = "no") -> Preference:
    return Preference(prompt, chosen, rejected, id="p", origin="file.jsonl, row 7")  # type: ignore[arg-type]


def demonstrated(record: Demonstration, tokenizer: PreTrainedTokenizerFast) -> TokenizedDemonstration:
    (done,) = tokenize_demonstrations([record], tokenizer)
    return done


def preferred(
    record: Preference, tokenizer: PreTrainedTokenizerFast, limits: Limits | None = None
) -> TokenizedPreference | None:
    """The tokenised pair, or None where it is dropped."""
    return next(iter(tokenize_preferences([record], tokenizer, limits)), None)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def check_specials(tokenizer: PreTrainedTokenizerFast, prompt: list[int], completion: list[int]) -> None:
    """BOS opens, once; EOS closes, once; where both are one token it stands at the two ends only."""
    whole = prompt + completion
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert completion[-1] == eos
    if bos is None:
        assert completion.count(eos) == 1
    else:
        assert prompt[0] == bos
        assert whole.count(bos) == whole.count(eos) == (2 if bos == eos else 1)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(sorted(MADE)), prompt=PLAIN, completion=PLAIN)
def test_plain_text_has_bos_once_eos_once_and_comes_back_whole(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = MADE[kind]
    prompt, completion = "Say" + prompt, completion + "."
    done = demonstrated(Demonstration(prompt, completion, "d"), tokenizer)
    check_specials(tokenizer, done.prompt, done.completion)
    start = 0 if tokenizer.bos_token_id is None else 1
    said = tokenizer.decode(done.prompt[start:] + done.completion[:-1], clean_up_tokenization_spaces=False)
    assert said == prompt + completion
    assert done.prompt == tokenize_prompt(prompt, tokenizer)


def test_the_boundary_never_merges() -> None:
    """GPT-2 merges newline and word when all is encoded at once; apart, the prompt keeps its tokens."""
    tokenizer = MADE["gpt2"]
    merged = tokenizer("Repeat:\nthe", add_special_tokens=False)["input_ids"]
    done = demonstrated(Demonstration("Repeat:\n", "the", "d"), tokenizer)
    assert done.prompt[1:] + done.completion[:-1] != merged
    assert tokenizer.decode(done.completion[:-1]) == "the"
    assert done.prompt[1:] == tokenizer("Repeat:\n", add_special_tokens=False)["input_ids"]


def test_no_space_is_put_before_a_completion() -> None:
    """Llama-2's tokenizer puts a space before all it encodes; a completion goes on where the prompt ended."""
    tokenizer = MADE["llama2"]
    alone = tokenizer("the coat", add_special_tokens=False)["input_ids"]
    done = demonstrated(Demonstration("Repeat:\n", "the coat", "d"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(done.completion)[0].startswith("▁")


def test_special_tokens_written_in_plain_text_are_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    words = f"a {tokenizer.eos_token} b {tokenizer.bos_token or ''} {tokenizer.eos_token}"
    done = preferred(pair(words, words, words + "!"), tokenizer)
    assert done is not None
    check_specials(tokenizer, done.prompt, done.chosen)
    check_specials(tokenizer, done.prompt, done.rejected)


def test_one_turn_of_chat_has_bos_once_and_eos_once(tokenizer: PreTrainedTokenizerFast) -> None:
    done = preferred(pair([user("the coat?")], [assistant("the coat.")], "no"), tokenizer)
    assert done is not None
    for completion in (done.chosen, done.rejected):
        check_specials(tokenizer, done.prompt, completion)
    turn_ends = 1 if tokenizer is MADE["qwen"] else int(tokenizer.bos_token == tokenizer.eos_token)
    assert done.prompt.count(tokenizer.eos_token_id) == turn_ends  # Qwen's user turns close with EOS too
    assert tokenizer.decode(done.chosen, skip_special_tokens=True).strip() == "the coat."
    assert "the coat?" in tokenizer.decode(done.prompt)
    assert "the coat." not in tokenizer.decode(done.prompt)
    assert done.prompt == tokenize_prompt([user("the coat?")], tokenizer)


def test_many_turns_of_chat_close_once_and_open_once(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [user("one"), assistant("two"), user("three")]
    done = demonstrated(Demonstration(prompt, [assistant("four")], "d"), tokenizer)
    assert done.completion.count(tokenizer.eos_token_id) == 1
    assert done.completion[-1] == tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        assert done.prompt[0] == tokenizer.bos_token_id != done.prompt[1]
    rendered = tokenizer.apply_chat_template([*prompt, assistant("four")], tokenize=False)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    said, written = (  # Llama-2's tokenizer puts a space after each special token
        "".join(text.split()).removeprefix(bos).removesuffix(eos)
        for text in (tokenizer.decode(done.prompt + done.completion), rendered)
    )
    assert said == written


def test_the_template_of_the_shared_tiny_models(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    done = demonstrated(Demonstration([user("hi")], "yo", "d"), tokenizer)
    assert tokenizer.decode(done.prompt) == "<s>[user]hi[assistant]"
    assert tokenizer.decode(done.completion) == "yo</s>"


def test_chat_needs_a_template_that_parts_prompt_and_answer() -> None:
    tokenizer = KINDS["gpt2"]()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"file\.jsonl, row 7: holds chat messages, but .* no chat template"):
        preferred(pair([user("a")], "b"), tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"file\.jsonl, row 7: .* renders the prompt otherwise"):
        preferred(pair([user("a")], "b"), tokenizer)
    with pytest.raises(
        UserError, match=r"file\.jsonl, row 7: the chat template refuses .*only user and assistant"
    ):
        preferred(pair([{"role": "system", "content": "a"}], "b"), MADE["llama2"])
    with pytest.raises(UserError, match=r"file\.jsonl, row 7: .*plain text and a completion is a chat"):
        preferred(pair("a", [assistant("b")]), MADE["llama2"])
    with pytest.raises(UserError, match=r"file\.jsonl, row 7: has no message"):
        preferred(pair([], "b"), MADE["llama2"])


def test_an_end_token_inside_a_chat_answer_is_refused() -> None:
    for words, kind in (("a <|im_end|> b", "qwen"), ("a </s> b", "llama2"), ("a <s> b", "llama2")):
        with pytest.raises(
            UserError, match=r"file\.jsonl, row 7: the completion holds the (end|start) token"
        ):
            preferred(pair([user("a")], words), MADE[kind])


@pytest.mark.parametrize("empty", ["", " \n", [], [{"role": "assistant", "content": ""}]])
def test_an_empty_completion_is_refused(tokenizer: PreTrainedTokenizerFast, empty: object) -> None:
    with pytest.raises(UserError, match=r"file\.jsonl, row 7: rejected is empty"):
        preferred(pair([user("a")], "b", empty), tokenizer)


def test_something_stands_before_the_first_completion_token(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.bos_token_id is None:
        with pytest.raises(UserError, match=r"file\.jsonl, row 7: the prompt is empty"):
            preferred(pair("", "b"), tokenizer)
    else:
        done = preferred(pair("", "b"), tokenizer)
        assert done is not None
        assert done.prompt == [tokenizer.bos_token_id]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = KINDS["gpt2"]()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        preferred(pair("a", "b"), tokenizer)


# --- lengths ------------------------------------------------------------------------------------------------


def byte_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def bytewise(tiny_llama: Path) -> PreTrainedTokenizerFast:
    """One token for each byte: lengths can be counted by hand."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_a_prompt_over_the_limit_is_refused_with_both_lengths(bytewise: PreTrainedTokenizerFast) -> None:
    record = pair("abcdef", "ghij", "kl")  # 1 + 6 and 4 + 1 tokens
    assert preferred(record, bytewise, Limits(12)) is not None
    with pytest.raises(UserError) as caught:
        preferred(record, bytewise, Limits(11))
    assert str(caught.value) == (
        "file.jsonl, row 7: prompt (7 tokens) and completion (5) make 12 tokens, over max_length 11; "
        "raise max_length, or set overlong to truncate or drop"
    )


def test_overlong_records_are_dropped_and_counted(bytewise: PreTrainedTokenizerFast) -> None:
    counts = TokenCounts()
    kept = tokenize_preferences(
        [pair("abcdef", "ghij"), pair("a", "b")], bytewise, Limits(11, "drop"), counts
    )
    assert len(kept) == 1
    assert counts == TokenCounts(kept=1, dropped_overlong=1)


def test_the_prompt_loses_its_oldest_tokens_first(bytewise: PreTrainedTokenizerFast) -> None:
    counts = TokenCounts()
    (done,) = tokenize_preferences([pair("abcdef", "ghij", "kl")], bytewise, Limits(9, "truncate"), counts)
    assert bytewise.decode(done.prompt) == "<s>def"
    assert (bytewise.decode(done.chosen), bytewise.decode(done.rejected)) == ("ghij</s>", "kl</s>")
    assert counts == TokenCounts(kept=1, truncated_prompts=1)


def test_a_completion_too_long_alone_loses_its_end(bytewise: PreTrainedTokenizerFast) -> None:
    counts = TokenCounts()
    (done,) = tokenize_preferences([pair("abcdef", "ghij", "kl")], bytewise, Limits(4, "truncate"), counts)
    assert bytewise.decode(done.prompt) == "<s>"
    assert (bytewise.decode(done.chosen), bytewise.decode(done.rejected)) == ("ghi", "kl</s>")
    assert counts == TokenCounts(kept=1, truncated_prompts=1, truncated_completions=1)


def test_completions_cut_to_the_same_tokens_are_dropped(bytewise: PreTrainedTokenizerFast) -> None:
    counts = TokenCounts()
    records = [pair("a", "same start, one", "same start, two"), pair("a", "x", "x")]
    assert tokenize_preferences(records, bytewise, Limits(6, "truncate"), counts) == []
    assert (counts.kept, counts.dropped_identical) == (0, 2)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(MADE)),
    texts=st.tuples(PLAIN, PLAIN, PLAIN),
    limit=st.integers(2, 40),
)
def test_truncation_keeps_to_the_limit(kind: str, texts: tuple[str, str, str], limit: int) -> None:
    tokenizer = MADE[kind]
    prompt, chosen, rejected = (text + end for text, end in zip(texts, "?!.", strict=True))
    whole = preferred(pair(prompt, chosen, rejected), tokenizer)
    cut = preferred(pair(prompt, chosen, rejected), tokenizer, Limits(limit, "truncate"))
    assert whole is not None
    if cut is None:
        assert chosen != rejected
        return
    longest = max(len(cut.chosen), len(cut.rejected))
    assert 1 <= len(cut.prompt) <= limit - longest
    assert cut.chosen == whole.chosen[: len(cut.chosen)]
    assert cut.rejected == whole.rejected[: len(cut.rejected)]
    if len(cut.prompt) < len(whole.prompt):
        assert len(cut.prompt) + longest == limit
        kept = cut.prompt if tokenizer.bos_token_id is None else cut.prompt[1:]
        assert kept == whole.prompt[len(whole.prompt) - len(kept) :]
        assert tokenizer.bos_token_id in (None, cut.prompt[0])
    elif len(whole.prompt) + max(len(whole.chosen), len(whole.rejected)) <= limit:
        assert cut == whole
    else:
        assert len(cut.prompt) + longest == limit


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ((1, "refuse"), "max_length is 1"),
        ((None, "drop"), "set max_length"),
        ((8, "cut"), "refuse, truncate or drop"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings_: tuple[int | None, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Limits(*settings_)  # type: ignore[arg-type]


def test_many_pairs_take_a_batch_not_a_lifetime() -> None:
    """Batches give what one by one gives, in order, and share their ids' memory."""
    tokenizer = MADE["llama2"]
    texts = [f"the coat {n}\n\nсорок" for n in range(2500)]
    records = [pair(text if n % 3 else [user(text)], "a" + text, "b" + text) for n, text in enumerate(texts)]
    start = time.perf_counter()
    done = tokenize_preferences(records, tokenizer)
    assert time.perf_counter() - start < 10, "100,000 pairs would take over six minutes"
    for n in (0, 1, 999, 1000, 2499):
        assert done[n] == preferred(records[n], tokenizer)
    ids = [i for example in done for i in example.prompt + example.chosen]
    assert len({id(i) for i in ids}) == len(set(ids))
