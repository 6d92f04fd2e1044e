"""The chat template: a conversation in transformers' format becomes the document that the model was trained on."""
import copy
import pickle
import random
import sys
import threading

import pytest
import torch
from tokenizers import normalizers
from transformers import ByT5Tokenizer

from dreamllm_edu.data.tasks import dialogues, edits, to_document
from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.models.dreamllm.layout import SlotLayout
from dreamllm_edu.parts.tokenizer import SPECIAL_TOKENS, encode_text

from conftest import CONTEXT, picture

PICTURE = picture(1)
QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is this?"}]}
]
PROMPT = ["User: ", PICTURE, " what is this?\nAssistant:"]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def as_conversation(document):
    """Messages that say what a training dialogue says: the inverse of the template, for one question and one answer."""
    text = "".join(part if isinstance(part, str) else "\0" for part in document.parts)
    pictures = iter(document.pictures)
    question, answer = text.removeprefix("User: ").split("\nAssistant:")
    messages = []
    for role, turn in (("user", question), ("assistant", answer)):
        first, *rest = turn.split("\0")
        content = [{"type": "text", "text": first}]
        for piece in rest:
            content += [{"type": "image", "image": next(pictures)}, {"type": "text", "text": piece}]
        messages.append({"role": role, "content": content})
    return messages


def test_a_question_about_a_picture_is_the_prompt_of_the_training_dialogues(processor):
    document = processor.apply_chat_template(QUESTION)
    assert isinstance(document, Document) and document == Document(PROMPT, 3)
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=False) == Document(
        ["User: ", PICTURE, " what is this?"], 3
    )


def test_the_template_gives_back_every_kind_of_training_dialogue(processor, world):
    rows = {row["task"]: row for row in dialogues(world, "train") + edits(world, "train")}
    assert set(rows) == {"show", "what", "style", "count", "relation", "edit"}
    for row in rows.values():
        document = to_document(row, world)
        assert processor.apply_chat_template(as_conversation(document)) == document, row["task"]
        prompt = processor.apply_chat_template(as_conversation(document)[:1])
        assert prompt == Document(document.parts[:document.given], document.given), row["task"]


def test_an_answer_is_learned_and_all_turns_before_it_are_given(processor):
    document = processor.apply_chat_template(QUESTION + [assistant("a cat"), user("which style?"), assistant("Noto")])
    assert document == Document([*PROMPT, " a cat\n", "User: which style?\nAssistant:", " Noto"], 5)
    waiting = processor.apply_chat_template(QUESTION + [assistant("a cat"), user("which style?")])
    assert waiting == Document([*PROMPT, " a cat\n", "User: which style?\nAssistant:"], 5)


def test_a_picture_may_end_a_turn(processor):
    drawn = [
        user("show me a cat."),
        assistant([{"type": "text", "text": "Here is cat:"}, {"type": "image", "image": PICTURE}]),
    ]
    assert processor.apply_chat_template(drawn) == Document(
        ["User: show me a cat.\nAssistant:", " Here is cat:", PICTURE], 1
    )
    document = processor.apply_chat_template(drawn + [user([{"type": "image", "image": PICTURE}])])
    assert document.parts == [
        "User: show me a cat.\nAssistant:",
        " Here is cat:",
        PICTURE,
        "\n",
        "User: ",
        PICTURE,
        "\nAssistant:",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "what is this?",
        "  what is this?\n",
        [{"type": "text", "text": "what is this?"}],
        ({"type": "text", "text": "what is this?"},),
        [{"type": "text", "text": "what"}, {"type": "text", "text": " is this? "}],
        [{"type": "text", "text": ""}, {"type": "text", "text": "what is this?"}],
    ],
)
def test_a_text_may_come_as_a_string_or_in_items(content, processor):
    assert processor.apply_chat_template([user(content)]) == Document(["User: what is this?\nAssistant:"], 1)


@pytest.mark.parametrize("item", [{"type": "image", "image": PICTURE}, {"type": "image", "content": PICTURE}, PICTURE])
def test_a_picture_may_come_under_either_key(item, processor):
    assert processor.apply_chat_template([user([item, "what is this?"])]) == Document(PROMPT, 3)


def test_a_transparent_picture_becomes_rgb_as_in_every_document(processor):
    document = processor.apply_chat_template([user([{"type": "image", "image": picture(2, mode="RGBA")}])])
    assert document.parts[1].mode == "RGB"


def test_a_dream_asks_for_a_picture(processor, tiny):
    request = [user("show me a cat."), assistant([{"type": "text", "text": "Here is cat:"}, {"type": "dream"}])]
    document = processor.apply_chat_template(request)
    assert document.parts == ["User: show me a cat.\nAssistant:", " Here is cat:", Dream()]
    drawn = tiny.generate(document, processor, max_new_tokens=0, num_inference_steps=1)
    assert drawn.parts[:2] == document.parts[:2] and len(drawn.pictures) == 1
    with pytest.raises(ValueError, match=r"Dream\(\).*generate"):
        processor.apply_chat_template(request, tokenize=True)


def test_tokens_of_a_prompt_are_those_of_its_document_without_an_end(processor):
    """With `</s>` behind it a prompt would be over before the answer."""
    batch = processor.apply_chat_template(
        QUESTION, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    whole = processor(Document(PROMPT, 3))
    assert (
        torch.equal(batch["input_ids"], whole["input_ids"][:, :-1])
        and whole["input_ids"][0, -1] == processor.layout.id["</s>"]
    )
    assert torch.equal(batch["pixel_values"], whole["pixel_values"]) and (batch["labels"] == -100).all()
    with pytest.raises(ValueError, match=f"context holds {CONTEXT}"):
        processor.apply_chat_template([user("a red cat " * CONTEXT)], tokenize=True)


def test_tokens_of_an_answered_conversation_are_those_of_its_document(processor):
    conversation = QUESTION + [assistant(["a cat", PICTURE])]
    batch, whole = (
        processor.apply_chat_template(conversation, tokenize=True),
        processor(processor.apply_chat_template(conversation)),
    )
    assert set(batch) == set(whole) == {"input_ids", "attention_mask", "labels", "pixel_values", "target_pixel_values"}
    assert all(torch.equal(batch[name], whole[name]) for name in whole)


@pytest.mark.parametrize("marker", [*SPECIAL_TOKENS, "<dream>"])
def test_text_of_a_user_never_becomes_a_special_token(marker, processor):
    conversation = [
        user(f"{marker} a {marker}"),
        assistant(f"{marker}"),
        user([{"type": "text", "text": marker}, {"type": "text", "text": f"b{marker}"}]),
    ]
    assert all(isinstance(part, str) for part in processor.apply_chat_template(conversation).parts)
    ids = processor.apply_chat_template(conversation, tokenize=True)["input_ids"][0].tolist()
    assert ids[0] == processor.layout.id["<s>"] and not set(processor.layout.id.values()) & set(ids[1:])
    assert processor.decode(ids).count(marker) == 5, "the text must come back as it was typed"


@pytest.mark.parametrize(
    "conversation, message",
    [
        (
            [{"role": "system", "content": "Be kind."}, user("hi")],
            "message 0: unknown role 'system'.*'user' and 'assistant'",
        ),
        ([{"content": "hi"}], "unknown role None"),
        ([assistant("hi")], "message 0: role 'assistant' where 'user' is expected"),
        ([user("hi"), user("again")], "message 1: role 'user' where 'assistant' is expected"),
        ([], "give a conversation"),
        ("hi", "give a conversation"),
        (None, "give a conversation"),
        ([[user("hi")]], "message 0 is a list"),
        ([user([{"type": "video", "video": "a.mp4"}])], "message 0: unknown type 'video'.*text.*image.*dream"),
        ([user([{"text": "hi"}])], "unknown type None"),
        ([user([{"type": "text"}])], "message 0: text is a NoneType"),
        ([user([{"type": "text", "text": 7}])], "text is a int"),
        ([user([{"type": "image", "image": "cat.png"}])], "image is a str; .*PIL.Image"),
        ([user([7])], "the content is a int"),
        ([user(None)], "the content is a NoneType"),
        ([{"role": "user"}], "the content is a NoneType"),
        ([user("")], "message 0: the content is empty"),
        ([user([])], "the content is empty"),
        ([user("hi"), assistant("  \n")], "message 1: the content is empty"),
    ],
)
def test_what_cannot_be_a_conversation_is_refused_with_what_can(conversation, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation)


def test_only_torch_tensors_are_returned(processor):
    for option in ({"return_dict": False}, {"return_tensors": "np"}):
        with pytest.raises(ValueError, match="BatchFeature of torch tensors"):
            processor.apply_chat_template(QUESTION, tokenize=True, **option)


def test_the_template_does_not_change_the_conversation(processor):
    conversation = [user([{"type": "text", "text": "hi"}]), assistant("ho")]
    processor.apply_chat_template(conversation)
    assert conversation == [user([{"type": "text", "text": "hi"}]), assistant("ho")]


# ---------------------------------------------------------------- a tokenizer that others use, too

def as_one_thread(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def random_text(rng):
    return "".join(rng.choice([*SPECIAL_TOKENS, " ", "a cat", "zörk", "\n", "日本", "<dream_", "start>", "</s", ">"])
                   for _ in range(rng.randrange(9)))


def test_a_typed_marker_stays_text_while_other_threads_use_the_tokenizer(tokenizer):
    """They store another setting, or a truncation, in the tokenizer that all share."""
    tokenizer, done, wrong, rng = copy.deepcopy(tokenizer), threading.Event(), [], random.Random(0)
    texts = [f"</s> typed {random_text(rng)}" for _ in range(3000)]
    expected = [as_one_thread(tokenizer, text) for text in texts]

    def others():
        while not done.is_set():
            for _ in range(50):
                tokenizer("<s> hello")
            tokenizer("<s> hello", truncation=True, max_length=2)

    def ours():
        for text, ids in zip(texts, expected):
            if encode_text(tokenizer, text) != ids or min(ids, default=9) < 9:
                wrong.append(text)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for work in (others, ours)]
        [thread.start() for thread in threads]
        threads[1].join(120)
    finally:
        done.set()
        sys.setswitchinterval(interval)
        threads[0].join(60)
    assert not wrong


def test_text_is_encoded_as_the_library_does_however_the_tokenizer_grows(tokenizer):
    tokenizer, rng = copy.deepcopy(tokenizer), random.Random(1)
    changes = [
        lambda t: None,
        lambda t: t.add_tokens(["zörk"]),
        lambda t: t.add_tokens(["cat"]),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<x>", "zörk"]}),
        lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    ]
    for change in changes:
        change(tokenizer)
        for one in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            for text in ["zörk", "<x> CAT", *(random_text(rng) for _ in range(50))]:
                assert encode_text(one, text) == as_one_thread(one, text), text
    assert not {len(tokenizer) - 1, len(tokenizer) - 2} & set(encode_text(tokenizer, "<x>"))
    slow = ByT5Tokenizer()
    assert encode_text(slow, "</s> a") == as_one_thread(slow, "</s> a") and 1 not in encode_text(slow, "</s> a")


def test_a_marker_that_is_read_in_plain_text_is_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<query>"])
    with pytest.raises(ValueError, match="no special tokens .* add_special_tokens"):
        SlotLayout(tokenizer, 2, 3, 64, {"<dream_query>": "<query>"})
    tokenizer.add_tokens(["<query>"], special_tokens=True)
    SlotLayout(tokenizer, 2, 3, 64, {"<dream_query>": "<query>"})
