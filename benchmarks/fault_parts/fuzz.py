"""10,000 fuzzed texts and files, by hypothesis with a fixed seed: no special token is injected, what promises to come
back comes back, and nothing but a `ValueError` with a message is raised.

The texts mix any Unicode (also halves of surrogate pairs) with markers of five tokenizers: whole, nested, cut, in
other case, with zero-width characters inside, and escaped. A failing example is shrunk by hypothesis and stands
among the misses."""

import html.parser
import json
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from . import row

MARKERS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<dream>",
    "<dream_start>",
    "<dream_query>",
    "<dream_end>",
    "<image_start>",
    "<image_patch>",
    "<image_end>",
    "<image>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[MASK]",
    "[UNK]",
    "<mask>",
    "<0x0A>",
    "<extra_id_0>",
    "\u2581",
    "\u2581</s>",
    "User:",
    "\nAssistant:",
    "{{ x }}",
    "{% x %}",
    "\0",
    "![](a.png)",
    "![",
    "](",
    "\\<dream>",
    "\\\\<dream>",
    "&lt;s&gt;",
]
ZERO = ["\u200b", "\u200d", "\ufeff", "\u2060", "\u00ad", "\u0301", "\u202e"]


@st.composite
def markers(draw) -> str:
    """A marker, changed in one of many ways."""
    marker, other = draw(st.sampled_from(MARKERS)), draw(st.sampled_from(MARKERS))
    at = draw(st.integers(0, len(marker)))
    way = draw(st.integers(0, 8))
    return [
        marker,
        marker.upper(),
        marker[:at] + other + marker[at:],
        marker[:at],
        marker[at:],
        marker[:at] + draw(st.sampled_from(ZERO)) + marker[at:],
        marker + marker,
        marker.swapcase() + " ",
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in marker),
    ][way]


def texts(surrogates: bool = False) -> st.SearchStrategy[str]:
    characters = st.characters() if surrogates else st.characters(exclude_categories=["Cs"])
    pieces = st.one_of(
        st.text(characters, max_size=12), markers(), st.sampled_from([" ", "\n", "\r\n", "\u2028", "a cat"])
    )
    return st.lists(pieces, max_size=8).map("".join)


class Fuzzer:
    """Runs properties with `n` examples each; collects rows."""

    def __init__(self, quick: bool, seed_: int):
        self.quick, self.seed, self.rows = quick, seed_, []

    def check(self, what: str, n: int, strategy: st.SearchStrategy, property_: Callable, note: str = "") -> None:
        """One row: `property_(example)` for `n` examples. It raises AssertionError where something is wrong; any other
        exception is wrong too. hypothesis stops at the first failure, so at most one miss is counted."""
        count, misses, n = [0], [], n // 50 if self.quick else n

        @seed(self.seed)
        @settings(
            max_examples=n,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(example):
            count[0] += 1
            property_(example)

        try:
            run()
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            misses.append(" ".join(f"{type(error).__name__}: {error} {notes}".split())[:500])
        self.rows.append(row(what, max(min(count[0], n), len(misses)), misses, note))


def only_value_error(job: Callable[[], object]) -> object | None:
    """The result of `job`, or None if it raised a `ValueError` with a message."""
    try:
        return job()
    except ValueError as error:
        assert len(str(error).split()) > 2, f"a message that says nothing: {error!r}"
        return None


def tokenizers() -> dict:
    """Five kinds of tokenizers with special tokens in their vocabularies, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dreamllm_edu.files import WEIGHTS
    from dreamllm_edu.parts.tokenizer import SPECIAL_TOKENS, read_tokenizer

    letters = [chr(i) for i in range(33, 127)]

    def fast(raw: Tokenizer) -> PreTrainedTokenizerFast:
        made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        made.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
        return made

    llama = Tokenizer(
        models.BPE(
            {
                t: i
                for i, t in enumerate(
                    [
                        "<unk>",
                        "<s>",
                        "</s>",
                        *(f"<0x{b:02X}>" for b in range(256)),
                        "\u2581",
                        *letters,
                        "<" if "<" not in letters else "\u2581a",
                    ]
                )
            },
            [],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "a", "cat"])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in ["\u2581", *letters])], 0)
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    return {
        "miniature": read_tokenizer(WEIGHTS / "mini" / "tokenizer"),
        "Llama (bytes as fallback)": fast(llama),
        "Unigram (as T5)": fast(unigram),
        "whole words": fast(words),
    }


def special_ids(tokenizer) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def texts_row(fuzzer: Fuzzer) -> None:
    from dreamllm_edu.parts.tokenizer import encode_text

    for name, tokenizer in tokenizers().items():
        special = special_ids(tokenizer)

        def no_token(text, tokenizer=tokenizer, special=special, name=name):
            ids = only_value_error(lambda: encode_text(tokenizer, text))
            assert not special & set(ids or ()), f"special tokens {sorted(special & set(ids))} from {text!r}"
            if name == "miniature" and ids is not None:
                assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text, "the text does not come back"

        fuzzer.check(
            f"texts through the tokenizer '{name}': no special token",
            1000,
            texts(surrogates=name == "miniature"),
            no_token,
            "the text comes back" if name == "miniature" else "",
        )


def processor_rows(fuzzer: Fuzzer) -> None:
    """Documents and conversations through the processor."""
    from dreamllm_edu.documents.document import Document
    from dreamllm_edu.models.dreamllm.weights import mini_processor

    processor = mini_processor(max_length=4096)
    special, layout = special_ids(processor.tokenizer), processor.layout

    def document(parts):
        made = only_value_error(lambda: processor(Document(parts)))
        if made is not None:
            found = [i for i in made["input_ids"][0].tolist() if i in special]
            assert found == [layout.id["<s>"], layout.id["</s>"]], f"special tokens {found}"

    def conversation(turns):
        talk = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        made = only_value_error(lambda: processor.apply_chat_template(talk))
        if made is not None:
            ids = processor(made, add_eos=False)["input_ids"][0].tolist()
            assert [i for i in ids if i in special] == [layout.id["<s>"]], "a special token in a conversation"

    fuzzer.check(
        "texts in documents: <s> and </s> are the only special tokens",
        1000,
        st.lists(texts(surrogates=True), max_size=4),
        document,
    )
    fuzzer.check(
        "texts in conversations: <s> is the only special token",
        1000,
        st.lists(texts(surrogates=True), min_size=1, max_size=4),
        conversation,
    )


def joined(parts: list) -> list:
    """Parts with neighbouring texts joined and empty ones left out: what a format can know."""
    out: list = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part != "":
            out.append(part)
    return out


class Tags(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes), "a script in an attribute"

    def handle_data(self, data):
        self.text.append(data)


def format_rows(fuzzer: Fuzzer, folder: Path) -> None:
    """Documents to Markdown, JSON and HTML and back."""
    from dreamllm_edu.documents.document import Document, Dream
    from dreamllm_edu.documents.formats import document_from_json, document_from_markdown, read_jsonl, write_jsonl

    parts = st.lists(st.one_of(texts(), texts(), st.just(Dream())), max_size=5)

    def markdown(example):
        again = document_from_markdown(Document(example).to_markdown())
        assert again.parts == joined(example), f"{again.parts!r}"

    def through_json(example):
        document = Document(example)
        assert document_from_json(document.to_json()) == document
        write_jsonl([document, document], folder / "a.jsonl")
        assert read_jsonl(folder / "a.jsonl") == [document, document]

    def page(example):
        tags = Tags()
        tags.feed(Document(example).to_html())
        assert set(tags.tags) <= {"div", "span", "br", "code"}, f"tags {tags.tags}"

    fuzzer.check("documents to Markdown and back", 1000, parts, markdown, "all parts come back")
    fuzzer.check("documents to JSON lines and back", 500, parts, through_json, "all parts come back")
    fuzzer.check("documents to HTML: no tag, no script from a text", 500, parts, page)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts(surrogates=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {}, optional={"text": texts(True) | JSON, "picture": texts(True) | JSON, "dream": st.just(True) | JSON}
)
DOCUMENT = st.fixed_dictionaries(
    {}, optional={"parts": st.lists(PART | JSON, max_size=4) | JSON, "given": st.integers(-2, 5) | JSON}
)
TALK = st.fixed_dictionaries(
    {},
    optional={
        "image": texts() | st.lists(texts(), max_size=2) | JSON,
        "conversations": st.lists(
            st.fixed_dictionaries(
                {}, optional={"from": st.sampled_from(["human", "gpt"]) | JSON, "value": texts(True) | JSON}
            ),
            max_size=4,
        )
        | JSON,
    },
)
PAGE = st.fixed_dictionaries(
    {},
    optional={
        "text_list": st.lists(texts(True), max_size=3) | JSON,
        "image_info": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "image_name": texts() | JSON,
                    "matched_text_index": st.integers(-1, 3) | JSON,
                    "matched_sim": st.floats() | JSON,
                },
            ),
            max_size=3,
        )
        | JSON,
    },
)


def spoiled(rows: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """Lines of JSON, some with bytes cut out or changed."""
    line = rows.map(lambda value: json.dumps(value).encode())
    cut = st.tuples(line, st.integers(0, 200), st.binary(max_size=4)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 2 :]
    )
    return st.lists(line | line | cut, max_size=4).map(b"\n".join)


def file_rows(fuzzer: Fuzzer, folder: Path) -> None:
    """Files as a user would hand them over, with anything in them."""
    from dreamllm_edu.app.cli import read_prompts
    from dreamllm_edu.data.readers import llava, mmc4
    from dreamllm_edu.documents.document import Dream
    from dreamllm_edu.documents.formats import document_from_markdown

    (folder / "images").mkdir()

    def markdown(text):
        document = only_value_error(lambda: document_from_markdown(text, folder))
        if document is not None and "![" not in text and "\\" not in text:
            shown = "".join("<dream>" if isinstance(part, Dream) else part for part in document.parts)
            assert shown == text, f"{document.parts!r}"

    def file(ending):
        def read(data):
            path = folder / f"prompt{ending}"
            path.write_bytes(data)
            only_value_error(lambda: read_prompts(path))

        return read

    def corpus(name, make):
        def read(data):
            (folder / name).write_bytes(data)
            for record in make("corpus", folder / name, folder / "images").read(str(folder / name)):
                if isinstance(record, ValueError):
                    assert len(str(record).split()) > 2
                else:
                    only_value_error(record.document)

        return read

    anything = (
        st.binary(max_size=60)
        | texts().map(lambda text: text.encode())
        | texts().map(lambda text: text.encode("utf-16"))
    )
    fuzzer.check("any text read as Markdown", 1000, texts(surrogates=True), markdown, "read, or refused with a message")
    fuzzer.check("any bytes as a Markdown file", 500, anything, file(".md"), "read, or refused with a message")
    fuzzer.check(
        "any JSON and any bytes as a JSONL file",
        1500,
        spoiled(DOCUMENT | JSON) | anything,
        file(".jsonl"),
        "read, or refused with a message",
    )
    fuzzer.check(
        "any JSON and any bytes as a shard of LLaVA",
        250,
        spoiled(TALK | JSON) | anything,
        corpus("a.json", llava),
        "read, or refused record by record",
    )
    fuzzer.check(
        "any JSON and any bytes as a shard of MMC4",
        250,
        spoiled(PAGE | JSON) | anything,
        corpus("a.jsonl", mmc4),
        "read, or refused record by record",
    )


def run(folder: Path, quick: bool, seed: int) -> list[dict]:
    fuzzer = Fuzzer(quick, seed)
    texts_row(fuzzer)
    processor_rows(fuzzer)
    format_rows(fuzzer, folder)
    file_rows(fuzzer, folder)
    return fuzzer.rows
