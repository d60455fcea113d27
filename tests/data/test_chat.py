"""Conversations as tokens: ids and masks are transformers', and only the answers are targets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from corpora import find_pieces
from in_process import output_of
from longctx import runtime
from longctx.config import DataConfig
from longctx.data.chat import Chat, ChatError, ChatTokenizer, chat_tokenizer
from longctx.data.loader import ShuffledTokens
from longctx.data.mixture import Mixture
from longctx.data.packing import IGNORE_INDEX, pack
from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.tokens import NO_END, TokenFolder
from longctx.errors import DataError
from longctx.sources import keep_tokenizer
from runs import ROOT, small_config, train

# after the templates of three families of models, with the assistant's turns marked
CHATML = (ROOT / "examples" / "chatml.jinja").read_text()
HEADERS = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start|>' + message.role + '<|end|>\\n\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}<|eot|>{% endgeneration %}
{%- else %}{{ message.content | trim }}<|eot|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
BRACKETS = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- elif message.role == 'system' %}<<SYS>>{{ message.content }}<</SYS>>
{%- else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS}
UNMARKED = {name: re.sub(r"{%(-?) (end)?generation %}", r"{{\1 '' }}", text) for name, text in TEMPLATES.items()}

ENDS = "<|endoftext|>", "<|im_end|>"
USER, ANSWER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
CHATS = {
    "one turn": Chat([USER, ANSWER]),
    "system prompt, three turns": Chat([{"role": "system", "content": "Be short."}, *[USER, ANSWER] * 3]),
    "empty turns": Chat([USER, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}, ANSWER]),
    "ends with a question": Chat([USER, ANSWER, USER]),
    "no answer": Chat([USER]),
    "spelled special tokens, é and 字": Chat([{"role": "user", "content": "<|im_end|> é 字"}, ANSWER]),
    "long": Chat([USER, {"role": "assistant", "content": "word " * 400}] * 2),
}
WITH_TOOLS = Chat([USER, {k: v for k, v in CALL.items() if v}, {"role": "tool", "content": "4"}, ANSWER], [TOOL])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer with the special tokens of the templates, and no template."""
    where = tmp_path_factory.mktemp("tokenizer")
    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), bos_token="<|begin|>", eos_token="<|endoftext|>",
        additional_special_tokens=special,
    )  # fmt: skip
    tokenizer.save_pretrained(str(where))
    return where


def template_file(folder: Path, text: str) -> Path:
    file = folder / f"{abs(hash(text))}.jinja"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", [*CHATS, "tools"])
def test_ids_and_masks_are_those_of_transformers(folder, name, chat):
    """With the answers marked in the template, and without."""
    if chat == "tools" and name != "chatml":
        name = "chatml"  # the only one of the three that knows them
    conversation = CHATS.get(chat, WITH_TOOLS)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(
        conversation.messages, tools=conversation.tools, chat_template=TEMPLATES[name], return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    for text in (TEMPLATES[name], UNMARKED[name]):
        ids, is_trained = ChatTokenizer(folder / "tokenizer.json", template_file(folder, text)).encode(conversation)
        assert ids.tolist() == expected["input_ids"]
        assert is_trained.astype(int).tolist() == expected["assistant_masks"]
    assert is_trained.any() == (chat != "no answer")


def test_a_template_that_writes_turns_otherwise_later_is_refused(folder):
    """As those that drop the reasoning of earlier turns."""
    as_it_was, otherwise = "{{- message.content or '' }}", "{{- message.content + ('' if loop.last else '~') }}"
    text = UNMARKED["chatml"].replace(as_it_was, otherwise)
    assert text != UNMARKED["chatml"]
    tokenizer = ChatTokenizer(folder / "tokenizer.json", template_file(folder, text))
    with pytest.raises(ChatError, match=r"writes message 2 otherwise when others follow.*generation"):
        tokenizer.encode(CHATS["system prompt, three turns"]._replace(messages=[USER, ANSWER, USER, ANSWER]))


def records(folder: Path, *lines: dict) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def prepared(tmp_path: Path, folder: Path, *lines: dict, **options) -> TokenFolder:
    pieces = find_pieces([records(tmp_path, *lines)])
    template = template_file(folder, CHATML)
    prepare(
        pieces, tmp_path / "out", folder / "tokenizer.json", validation_fraction=0.0, chat_template=template, **options
    )
    return TokenFolder(tmp_path / "out", 9000, check_hashes=True)


def targets_of(corpus: TokenFolder) -> list[str]:
    """The text of each run of targets in the training split, as one sequence."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer_file))
    split = corpus.splits["train"]
    sequence = pack(*split.read(0, len(split)))
    is_target = np.concatenate([[False], sequence.targets != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(np.diff(is_target.astype(int)))
    return [tokenizer.decode(sequence.targets[a:b]) for a, b in edges.reshape(-1, 2)]


def test_only_answers_are_targets(tmp_path, folder):
    """Of conversations, of prompts with completions of both kinds, beside a text of which everything is."""
    lines = [
        {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "Still 4."}]},
        {"prompt": "Q: 3?", "completion": " A: three"},
        {"prompt": "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n", "completion": "3<|endoftext|>"},
        {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "Four."}]},
        {"messages": WITH_TOOLS.messages, "tools": json.dumps(WITH_TOOLS.tools)},
        {"text": "a whole text"},
        {"messages": [USER]},
    ]
    corpus = prepared(tmp_path, folder, *lines)
    found = targets_of(corpus)
    assert found[:5] == [
        "It is 4.<|im_end|>\n", "Still 4.<|im_end|>\n", " A: three<|endoftext|>", "3<|endoftext|>", "Four.<|im_end|>\n",
    ]  # fmt: skip
    assert found[5].startswith("<tool_call>")
    assert found[6] == "It is 4.<|im_end|>\n"
    assert found[7].endswith("whole text<|endoftext|>")
    end, end_of_turn = (Tokenizer.from_file(str(corpus.tokenizer_file)).token_to_id(t) for t in ENDS)
    assert corpus.manifest.answers == {str(end_of_turn): 5}
    assert corpus.ends == [end_of_turn, end]
    assert corpus.chat_prompt == ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"]
    assert corpus.manifest.skipped == 1
    assert "no turn of the assistant" in corpus.manifest.skipped_examples[0]
    mixture = Mixture([corpus], [1.0])
    assert mixture.is_packed(DataConfig())
    assert not mixture.is_packed(DataConfig(separate_documents=False))  # one text, which is cut


def test_a_mixture_has_the_template_of_its_conversations(tmp_path, folder):
    """Wherever they stand in it."""
    corpora = []
    for name, record in (
        ("text", {"text": "a whole text"}),
        ("completions", {"prompt": "Q: 3?", "completion": " A: three"}),
        ("chats", {"messages": [USER, ANSWER]}),
    ):
        (tmp_path / name).mkdir()
        corpora.append(prepared(tmp_path / name, folder, record))
    mixture = Mixture(corpora, [1.0, 1.0, 1.0])
    assert mixture.chat_prompt == corpora[2].chat_prompt != []
    assert mixture.chat_folder == corpora[2].folder
    assert mixture.ends == corpora[2].ends
    assert corpora[1].chat_prompt == []  # nothing is asked through a template that nothing was written with
    assert [corpus.ends for corpus in corpora[:2]] == [[mixture.end_of_document]] * 2
    assert len(mixture.ends) == 2


def test_forms_of_messages(tmp_path, folder):
    """Content in parts of text, arguments of calls as text, halves of surrogate pairs; as the plain forms."""
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 2}}}]}
    as_text = json.loads(json.dumps(call))
    as_text["tool_calls"][0]["function"]["arguments"] = '{"a": 2}'
    parts = {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}
    plain = {"role": "user", "content": "2 + 2?"}
    result, in_parts = ({"role": "tool", "content": content} for content in ("4", [{"type": "text", "text": "4"}]))
    found = []
    for name, messages in (
        ("plain", [plain, call, result, {"role": "assistant", "content": "\ufffd"}]),
        ("forms", [parts, as_text, in_parts, {"role": "assistant", "content": "\ud800"}]),
    ):
        (tmp_path / name).mkdir()
        split = prepared(tmp_path / name, folder, {"messages": messages}).splits["train"]
        found.append(split.read(0, len(split))[0])
    assert np.array_equal(*found)
    nothing = {"role": "tool", "content": []}  # of a tool that has found nothing: no text in parts
    file = records(tmp_path, {"messages": [USER, nothing, ANSWER]})
    [document] = [document for piece in find_pieces([file]) for document in piece.documents()]
    assert document.answers.messages[1] == nothing


def test_objects_of_parquet_have_no_invented_keys(tmp_path, folder):
    """Arrow gives each row's objects the keys of all rows' objects, as null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def calling(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]

    chats = [calling({"a": 2}), calling({"city": "Rome"})]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "c.parquet")
    found = []
    for name, pieces in (
        ("parquet", find_pieces([tmp_path / "c.parquet"])),
        ("lines", find_pieces([records(tmp_path, *({"messages": chat} for chat in chats))])),
    ):
        file = template_file(folder, CHATML)
        prepare(pieces, tmp_path / name, folder / "tokenizer.json", validation_fraction=0.0, chat_template=file)
        split = TokenFolder(tmp_path / name, 1 << 16).splits["train"]
        found.append(split.read(0, len(split))[0])
    assert np.array_equal(*found)


def test_one_short_conversation_is_a_sequence(tmp_path, folder):
    """Of few held-out conversations validation is possible too: the rest of a sequence is empty."""
    split = prepared(tmp_path, folder, {"messages": [USER, ANSWER]}).splits["train"]
    source = ShuffledTokens(split, DataConfig(sequence_length=500), 0, "here")
    assert source.size == 1
    assert 0 < (source.sequence(0).targets != IGNORE_INDEX).sum() < len(split) < 100


def test_a_conversation_longer_than_a_sequence(tmp_path, folder):
    """Each token of its answers is a target of one window, as of the whole."""
    chat = CHATS["long"]
    corpus = prepared(tmp_path, folder, {"messages": chat.messages}, {"messages": [USER, ANSWER] * 40})
    split = corpus.splits["train"]
    trained = split.read(0, len(split))[2]
    source = ShuffledTokens(split, DataConfig(sequence_length=100), 0, "here")
    windows = sorted((source.sequence(n) for n in range(source.size)), key=lambda s: s.tokens.tobytes())
    targets = sum(int((s.targets != IGNORE_INDEX).sum()) for s in windows)
    trained[split.read(0, len(split))[1]] = False  # the first of a document is no target
    assert targets == trained[1:].sum() > 400


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("record", [{"id": "a b", "messages": [USER, ANSWER]}, {"id": 1, "text": "a [b] {c}"}])
def test_an_array_of_records_is_no_text(tmp_path, indent, record):
    (tmp_path / "chats.json").write_text(json.dumps([record] * 3, indent=indent))
    with pytest.raises(DataError, match=r"chats.json: holds a JSON array of records; make JSON lines of it"):
        find_pieces([tmp_path / "chats.json"])
    (tmp_path / "list.txt").write_text('[{a} list of "messages": none]')
    assert [part.kind for piece in find_pieces([tmp_path / "list.txt"]) for part in piece.ranges] == ["text"]


def test_what_cannot_be_rendered_is_named(tmp_path, folder):
    bad = {"messages": [USER, {"role": "assistant", "content": "!"}]}
    file = template_file(folder, "{{ raise_exception('only words') if messages[-1].content == '!' }}" + CHATML)
    pieces = find_pieces([records(tmp_path, bad, {"messages": [USER, ANSWER]})])
    options = {"validation_fraction": 0.0, "chat_template": file}
    with pytest.raises(DataError, match=r"chats.jsonl:1: the chat template does not take it .*only words.*skip-unread"):
        prepare(pieces, tmp_path / "a", folder / "tokenizer.json", **options)
    assert prepare(pieces, tmp_path / "b", folder / "tokenizer.json", skip_unreadable=True, **options).skipped == 1
    with pytest.raises(DataError, match="has no chat template beside it"):
        prepare(pieces, tmp_path / "c", folder / "tokenizer.json", validation_fraction=0.0)
    unmarked = template_file(folder, re.sub(r"{%-? (end)?generation -?%}", "", CHATML))
    with pytest.raises(ChatError, match="begins with the assistant, whose turn this template does not mark"):
        ChatTokenizer(folder / "tokenizer.json", unmarked).encode(Chat([ANSWER]))
    for line, said in (
        ({"messages": []}, "field 'messages' holds no list of messages"),
        ({"messages": "hello"}, "field 'messages' holds no list"),
        ({"prompt": "a"}, "no field 'text'; name it with --text-field"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "field 'tools' is not JSON"),
        ({"messages": [USER, ANSWER], "text": "both"}, "fields 'text' and 'messages': drop what is not"),
        ({"prompt": "a", "completion": "b", "text": "ab"}, "'text' and 'prompt' with 'completion': drop what is not"),
        (
            {"messages": [USER, {"role": "assistant", "content": {"a": 1}}]},
            "content of a message holds no text but {'a'",
        ),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "a message has weight 0"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"function": "f"}]}]}, "tool_calls hold no list of calls"),
        ({"messages": [USER, ANSWER | {"tool_calls": 3}]}, "tool_calls hold no list of calls"),
    ):
        pieces = find_pieces([records(tmp_path, line)])
        with pytest.raises(DataError, match=said):
            prepare(pieces, tmp_path / "d", folder / "tokenizer.json", validation_fraction=0.0, chat_template=file)


def test_special_tokens_of_a_template_are_those_of_the_tokenizers_configuration(tmp_path, folder):
    """Jinja writes nothing for a name that it does not know: no answer would have its end."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "tokenizer.json", alone)
    (alone / "chat_template.jinja").write_text(BRACKETS)
    message = "the chat template writes bos_token and eos_token, which tokenizer_config.json names"
    for template in (None, template_file(folder, BRACKETS)):
        with pytest.raises(DataError, match=message):
            ChatTokenizer(alone / "tokenizer.json", template)
    (alone / "chat_template.jinja").write_text(CHATML)
    assert ChatTokenizer(alone / "tokenizer.json").templates == {"default": CHATML}


THINKS = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


@pytest.mark.parametrize(
    ("name", "chat", "said"),
    [
        ("headers", Chat([USER, CALL | {"content": ""}]), r"the call of add of message 2 \(assistant\): 'add'"),
        ("headers", Chat([USER, ANSWER], [TOOL]), "does not write the tool 'add'; give one that does"),
        ("headers", Chat([USER, THINKS]), "the reasoning_content of message 2"),
        ("headers", Chat([USER, THINKS, USER, ANSWER]), None),  # of an earlier turn: as templates drop it on purpose
        ("brackets", Chat([{"role": "tool", "content": "4"}, ANSWER]), None),
        ("last", Chat([USER, ANSWER, {"role": "user", "content": "3?"}, ANSWER]), r"the content of message 1 \(user\)"),
        ("switch", Chat([{"role": "system", "content": "Be brief. /no_think"}, USER, ANSWER]), None),  # as SmolLM3's
    ],
    ids=str,
)
def test_what_a_template_does_not_write_is_named(folder, name, chat, said):
    """A call that is not there would be trained on as an answer of nothing."""
    others = {
        "last": CHATML.replace("for message in messages", "for message in messages[-2:]"),
        "switch": CHATML.replace("+ message.content +", "+ message.content.replace('/no_think', '').rstrip() +"),
    }
    tokenizer = ChatTokenizer(folder / "tokenizer.json", template_file(folder, (TEMPLATES | others)[name]))
    if said is None:
        assert tokenizer.encode(chat)[1].any()
        return
    with pytest.raises(ChatError, match=said):
        tokenizer.encode(chat)


def test_the_example_writes_tools_and_reasoning_as_qwen_does(folder):
    tokenizer = ChatTokenizer(folder / "tokenizer.json", template_file(folder, CHATML))
    system, call = {"role": "system", "content": "Be short."}, CALL["tool_calls"][0]
    both = {"role": "assistant", "content": "I add.", "tool_calls": [call, call], "reasoning_content": "Adding."}
    results = [{"role": "tool", "content": "4"}, {"role": "tool", "content": {"sum": 4}}]
    text = tokenizer.render([system, USER, both, *results, ANSWER], [TOOL, TOOL])
    head, _, rest = text.partition("<|im_start|>user\n")
    assert head.startswith("<|im_start|>system\nBe short.\n\n# Tools\n\n")
    assert head.count("Be short.") == 1
    assert f"<tools>\n{json.dumps(TOOL)}\n{json.dumps(TOOL)}\n</tools>\n" in head
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert rest == (
        f"What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\nAdding.\n</think>\n\nI add.\n{called}\n{called}"
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n"
        '{"sum": 4}\n</tool_response><|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n'
    )
    assert tokenizer.render([USER, CALL], None).endswith(f"assistant\n{called}<|im_end|>\n")  # content null


def test_several_templates_are_chosen_by_the_tools(tmp_path, folder):
    """As transformers chooses them; marked or not; all are kept with the corpus, for transformers to read."""
    where = tmp_path / "model"
    shutil.copytree(folder, where)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(where))
    tokenizer.chat_template = {"default": CHATML, "tool_use": "USE" + UNMARKED["chatml"]}
    tokenizer.save_pretrained(str(where))
    with_tools, without = Chat(WITH_TOOLS.messages, [TOOL]), Chat([USER, ANSWER])
    for chat, begin in ((with_tools, "USE<|im_start|>system"), (without, "<|im_start|>user")):
        ids, is_trained = ChatTokenizer(where / "tokenizer.json").encode(chat)
        assert tokenizer.decode(ids).startswith(begin)
        assert is_trained.any()
    lines = {"messages": with_tools.messages, "tools": [TOOL]}, {"messages": without.messages}
    pieces = find_pieces([records(tmp_path, *lines)])
    prepare(pieces, tmp_path / "corpus", where / "tokenizer.json", validation_fraction=0.0)
    kept = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "corpus"))
    assert kept.chat_template == tokenizer.chat_template
    assert kept.special_tokens_map == tokenizer.special_tokens_map
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    shutil.rmtree(where / "additional_chat_templates")
    (where / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(str(where))
    with pytest.raises(DataError, match="its chat templates are rag, tool_use, and none is the default"):
        ChatTokenizer(where / "tokenizer.json")


def test_answers_that_do_not_end_are_counted(tmp_path, folder):
    """And none of them is taken for one that ends with what stands in it."""
    end = "{{- '%s\\n' }}\n        {%%- endgeneration"
    without = CHATML.replace(end % "<|im_end|>", end % "")
    assert without != CHATML
    answers = [{"role": "assistant", "content": text} for text in ("<|eot|> and more", "no end", "an end<|eot|>\n")]
    pieces = find_pieces([records(tmp_path, *({"messages": [USER, answer]} for answer in answers))])
    file = template_file(folder, without)
    made = prepare(pieces, tmp_path / "a", folder / "tokenizer.json", validation_fraction=0.0, chat_template=file)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert made.answers == {NO_END: 2, str(tokenizer.token_to_id("<|eot|>")): 1}
    assert made.ends == [tokenizer.token_to_id("<|eot|>"), tokenizer.token_to_id("<|endoftext|>")]


def test_a_mended_template_begins_anew(tmp_path, folder):
    """That which lies beside the tokenizer, too: what was done with the one before is not kept."""
    tokenizer = tmp_path / "model"
    shutil.copytree(folder, tokenizer)
    template = tokenizer / "chat_template.jinja"
    chats = [{"messages": [USER, ANSWER]}] * 3 + [{"messages": [USER, {"role": "assistant", "content": "!"}]}]
    pieces = []
    for number, chat in enumerate(chats):
        (tmp_path / f"{number}").mkdir()
        pieces += find_pieces([records(tmp_path / f"{number}", chat)])
    template.write_text("OLD{{ raise_exception('no') if messages[-1].content == '!' }}" + CHATML)
    with pytest.raises(DataError, match="does not take it"):
        prepare(pieces, tmp_path / "corpus", tokenizer / "tokenizer.json", validation_fraction=0.0)
    template.write_text("NEW" + CHATML)
    chat_tokenizer.cache_clear()
    prepare(pieces, tmp_path / "corpus", tokenizer / "tokenizer.json", validation_fraction=0.0)
    ids = np.concatenate([np.asarray(d) for d in TokenFolder(tmp_path / "corpus", 1 << 16).splits["train"].tokens])
    text = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids.tolist(), skip_special_tokens=False)
    assert (text.count("NEW"), text.count("OLD")) == (4, 0)


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("The capital of France is", " Paris.", "▁Paris.</s>"),
        ("The capital i", "s Paris.", "is▁Paris.</s>"),  # a token reaches from one into the other
        ("The capital", "", ""),
    ],
)
def test_a_completion_goes_on_where_its_prompt_ends(tmp_path, prompt, completion, trained):
    """Though the tokenizer puts a space before each text that it is given, as SentencePiece's do."""
    vocabulary = {c: i for i, c in enumerate(["</s>", *"▁ThecapitlofrnsFP.", "is"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("i", "s")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    line = {"prompt": prompt, "completion": completion}
    pieces = find_pieces([records(tmp_path, line, {"prompt": "The", "completion": " Paris"})])
    prepare(pieces, tmp_path / "corpus", tmp_path / "tokenizer.json", validation_fraction=0.0)
    ids, is_trained = first_document(tmp_path / "corpus") if trained else (np.empty(0, int), np.empty(0, bool))
    assert not trained or ids.tolist() == [*tokenizer.encode(prompt + completion).ids, 0]
    assert "".join(tokenizer.id_to_token(i) for i in ids[is_trained].tolist()) == trained
    assert TokenFolder(tmp_path / "corpus", 1 << 16).manifest.skipped == (not trained)


def first_document(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    split = TokenFolder(folder, 1 << 16).splits["train"]
    end = int(split.document_ends[0][0])
    return np.asarray(split.tokens[0])[:end], split.trained_of_shard(0)[:end]


def test_places_of_what_is_left_out_are_looked_up_for_the_examples_alone(tmp_path, folder, monkeypatch):
    """Each takes reading the file up to there."""
    looked_up = []
    monkeypatch.setattr("longctx.data.text._line_at", lambda path, offset: looked_up.append(offset) or f"{path}:?")
    pieces = find_pieces([records(tmp_path, *[{"messages": [USER]}] * 50, {"messages": [USER, ANSWER]})])
    template = template_file(folder, CHATML)
    made = prepare(pieces, tmp_path / "a", folder / "tokenizer.json", validation_fraction=0.0, chat_template=template)
    assert (made.skipped, len(made.skipped_examples), len(looked_up)) == (50, 20, 20)


TURNS = """{{ bos_token + '' }}{% for message in messages %}
{{- message.role + ': ' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|eot|>' }}{% endgeneration %}
{%- else %}{{ message.content + eos_token }}{% endif %}
{%- endfor %}"""
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def test_what_conversations_were_written_with_goes_along(tmp_path):
    """Templates and the special tokens that they write; and generation stops where answers end, without being told."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|eot|>"],
    )  # fmt: skip
    tokenizer.chat_template = {"default": TURNS, "tool_use": "{{ tools[0].function.name }}" + TURNS}
    tokenizer.save_pretrained(str(tmp_path / "model"))
    chats = [{"messages": CHAT}, {"messages": CHAT, "tools": TOOLS}] * 8
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    file = tmp_path / "model" / "tokenizer.json"
    prepare(find_pieces([tmp_path / "chats.jsonl"]), tmp_path / "corpus", file, validation_fraction=0.0)
    config = small_config(
        tmp_path, tmp_path / "corpus", optim__steps=1, validation__sequences=0, data__sequences_per_step=1
    )
    config.model.vocab_size = 8200
    train(config)
    step = str(config.run_folder / "checkpoints" / "latest")
    eot, end, im_end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|eot|>", "<|endoftext|>", "<|im_end|>"))
    for number, (more, ends) in enumerate(
        (
            ([], [eot, end]),
            (["--end-of-document", "<|im_end|>"], [im_end, eot, end]),
            (["--tokenizer", str(file)], [eot, end]),
            (["--tokenizer", str(file), "--end-of-document", "<|eot|>"], eot),
        )
    ):
        out = tmp_path / f"out{number}"
        output_of(ROOT / "tools" / "convert_hf.py", "export", step, "--output", str(out), *more)
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ends
        read = AutoTokenizer.from_pretrained(out)
        for tools in (None, TOOLS):
            expected = tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False)
            assert read.apply_chat_template(CHAT, tools=tools, tokenize=False) == expected
            assert "<|begin|>" in expected
        assert read.special_tokens_map == tokenizer.special_tokens_map
        assert read(["a", "b c d e"], padding=True)["input_ids"][0][-1] == tokenizer.pad_token_id
    (config.run_folder / "tokenizer.json").unlink()  # as of files of Megatron: which ids end texts is a guess then
    words = "export", step, "--output", str(tmp_path / "a"), "--tokenizer", str(file)
    output_of(ROOT / "tools" / "convert_hf.py", *words)
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"] == end


def trained_words(file: Path, template: Path, chat: Chat) -> str:
    tokenizer = ChatTokenizer(file, template)
    ids, is_trained = tokenizer.encode(chat)
    return tokenizer.tokenizer.decode(ids[is_trained])


def test_answers_are_found_where_tokens_leave_white_space_out_of_their_places(tmp_path, folder):
    """As byte-level tokenizers that trim offsets do, where a turn begins or ends with spaces."""
    data = json.loads((folder / "tokenizer.json").read_text())
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"post_processor": trimming}))
    shutil.copyfile(folder / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    said = [" first answer  ", " a2", "a3 "]
    chat = Chat([turn for text in said for turn in (USER, {"role": "assistant", "content": text})])
    closed_outside = CHATML.replace("<|im_end|>\\n' }}{%- endgeneration", "' }}{%- endgeneration")
    for text in (CHATML, closed_outside):
        found = trained_words(tmp_path / "tokenizer.json", template_file(tmp_path, text), chat)
        assert found == trained_words(folder / "tokenizer.json", template_file(folder, text), chat)
        assert re.findall("first answer|a2|a3|What", found) == ["first answer", "a2", "a3"]


def test_a_completion_of_messages_is_trained_on_from_its_first_word(tmp_path, folder):
    """Where the template ends a conversation with more than the end of the turn, and the prompt alone is longer."""
    ending = BRACKETS + "{% if not add_generation_prompt %}" + "<|endoftext|>" * 3 + "{% endif %}"
    template = template_file(tmp_path, ending)
    asked = [USER, ANSWER, USER]
    chat = Chat([*asked, {"role": "assistant", "content": "The answer is long"}], given=len(asked))
    found = trained_words(folder / "tokenizer.json", template, chat)
    assert found.strip() == "The answer is long<|endoftext|>"


def test_a_tokenizer_that_is_linked_to_has_its_template_beside_the_link(tmp_path, folder):
    """As in the cache of downloads of Hugging Face, where files are links to blobs of other names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    texts = {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    for number, (name, text) in enumerate({**texts, "chat_template.jinja": CHATML}.items()):
        (blobs / f"{number:x}").write_text(text)
        (snapshot / name).symlink_to(blobs / f"{number:x}")
    pieces = find_pieces([records(tmp_path, {"messages": [USER, ANSWER]})])
    made = prepare(pieces, tmp_path / "out", snapshot / "tokenizer.json", validation_fraction=0.0)
    assert sum(made.answers.values()) == 1
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (kept["bos_token"], kept["eos_token"]) == ("<|begin|>", "<|endoftext|>")


def test_conversations_of_two_templates_are_not_mixed(tmp_path, folder):
    corpora = []
    for name, text in (("a", CHATML), ("b", HEADERS)):
        pieces = find_pieces([records(tmp_path, {"messages": [USER, ANSWER]})])
        template = template_file(folder, text)
        prepare(pieces, tmp_path / name, folder / "tokenizer.json", validation_fraction=0.0, chat_template=template)
        corpora.append(TokenFolder(tmp_path / name, 9000))
    with pytest.raises(DataError, match=r"b: its conversations write a question as .*prepare both with one --chat"):
        Mixture(corpora, [1.0, 1.0])


def test_what_a_template_refuses_when_it_marks_is_named_too(tmp_path, folder):
    refusing = "{% if messages[-1].role == 'user' %}{{ raise_exception('no question last') }}{% endif %}" + CHATML
    tokenizer = ChatTokenizer(folder / "tokenizer.json", template_file(tmp_path, refusing))
    with pytest.raises(ChatError, match="does not take it .*no question last"):
        tokenizer.encode(Chat([USER, ANSWER], given=1))


def test_a_template_may_mark_the_last_answer_alone(tmp_path, folder):
    """The prompt's own last answer is marked where it stands alone, and not in the whole."""
    marking = """{% for m in messages %}{{ m.role + ': ' }}{% if loop.last and m.role == 'assistant' %}
{%- generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"""
    chat = Chat([USER, ANSWER, USER, {"role": "assistant", "content": "five"}], given=2)
    assert trained_words(folder / "tokenizer.json", template_file(tmp_path, marking), chat).strip() == "five"


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_an_export_will_lack_is_told(tmp_path, folder, capsys, where):
    """A chat model that is trained on from text alone."""
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    run.mkdir()
    (model / where).write_text(CHATML if where.endswith("jinja") else json.dumps({"chat_template": CHATML}))
    corpus = prepared(tmp_path, folder, {"text": "a whole text"})
    keep_tokenizer(Mixture([corpus], [1.0]), run, runtime.start(60), str(model))
    assert f"{model} has a chat template, and the text no conversations" in capsys.readouterr().out
    chats = tmp_path / "chats"
    chats.mkdir()
    corpus = prepared(chats, folder, {"messages": [USER, ANSWER]})
    keep_tokenizer(Mixture([corpus], [1.0]), run, runtime.start(60), str(model))
    assert capsys.readouterr().out == ""
