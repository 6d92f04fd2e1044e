"""`generate` from eight threads on one model and one processor: do the answers stay what they are one after another?

Every thread continues its own prompts with its own seed: texts and pictures to be read and to be drawn, markers
typed by the user (`</s>`, `<dream_start>`), a callback. The model is once in evaluation mode and once in training
mode, with dropout and gradient checkpointing, which must not act while it generates and must be there afterwards.
Two more threads use the same tokenizer as others would, with special tokens recognised, and check their own ids."""

import threading
import time
from pathlib import Path

import torch
from PIL import Image

from . import row

THREADS = 8
TYPED = ["</s>", "<dream_start>", "<s><image_patch>", "<dream>"]


def prompts(model, pictures: list[Image.Image], words: list[str]) -> list:
    """One prompt for each thread, no two alike."""
    from dreamllm_edu.documents.document import Document, Dream

    made = []
    for i in range(THREADS):
        typed, picture = TYPED[i % len(TYPED)], pictures[i % len(pictures)]
        kinds = [
            [f"{words[i % len(words)]} {typed}"],
            [words[i % len(words)], Dream()],
            [picture, f" {typed} {i}"],
            [f"{i}", Dream(), typed],
        ]
        made.append(Document(kinds[i % len(kinds)], name=f"prompt {i}"))
    return made


def answer(model, processor, prompt, i: int, options: dict) -> tuple:
    """What one call gives: texts, the bytes of its pictures, and what its callback received. The first calls are the
    shortest, so that some end while others have just begun."""
    received = []
    options = {**options, "max_new_tokens": 2 + i * options["max_new_tokens"] // THREADS}
    document = model.generate(
        prompt,
        processor,
        seed=i,
        temperature=0.7 * (i % 2),
        **options,
        callback=lambda _, part: received.append(part if isinstance(part, str) else "picture"),
    )
    return tuple(part if isinstance(part, str) else part.tobytes() for part in document.parts), "".join(received)


def disturb(tokenizer, stop: threading.Event, wrong: list[str], seen: list[int]) -> None:
    """Use the tokenizer as its other users do, and as the processor does, again and again, until `stop`."""
    from dreamllm_edu.parts.tokenizer import encode_text

    end = tokenizer.eos_token_id
    try:
        while not stop.is_set():
            if tokenizer("a cat</s>", add_special_tokens=False)["input_ids"].count(end) != 1:
                wrong.append("a tokenizer's other user gets </s> as letters while the model generates")
            if end in encode_text(tokenizer, "a cat</s>"):
                wrong.append("typed </s> becomes the special token while others use the tokenizer")
            seen[0] += 1
            stop.wait(0.0002)
    except Exception as error:  # an error in a thread would be lost
        wrong.append(f"the tokenizer's other user: {type(error).__name__}: {error}")


def at_once(model, processor, questions: list, options: dict, shared: bool = True) -> tuple[list, list[str], int]:
    """The answers of all threads at once, what went wrong, and how often the tokenizer was used beside them."""
    answers, wrong, stop, gate, seen = [None] * len(questions), [], threading.Event(), threading.Barrier(THREADS), [0]

    def ask(i):
        try:
            gate.wait(60)
            time.sleep(0.01 * i)  # one after the other, so that the first to come is the first to leave
            answers[i] = answer(model, processor, questions[i], i, options)
        except Exception as error:
            wrong.append(f"thread {i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    others = [threading.Thread(target=disturb, args=(processor.tokenizer, stop, wrong, seen)) for _ in range(2)]
    for thread in threads + (others if shared else []):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    for thread in others if shared else []:
        thread.join()
    return answers, list(dict.fromkeys(wrong)), seen[0]


def with_dropout(model) -> None:
    """Training mode with what only training should do: attention dropout, layers computed again."""
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()


def compare(model, processor, questions, options: dict, rounds: int, training: bool, typed: bool = True) -> tuple:
    """(number of answers, misses) of `rounds` rounds against the answers one after another, in evaluation mode."""
    model.eval()
    alone = [answer(model, processor, question, i, options) for i, question in enumerate(questions)]
    if training:
        with_dropout(model)
    misses, used = [], 0
    for number in range(rounds):
        answers, wrong, seen = at_once(model, processor, questions, options, typed)
        used += seen
        misses += [f"round {number}: {text}" for text in wrong]
        for i, (own, other) in enumerate(zip(alone, answers)):
            if other is not None and own != other:
                kind = (
                    "text"
                    if [p for p in own[0] if isinstance(p, str)] != [p for p in other[0] if isinstance(p, str)]
                    else "picture or callback"
                )
                misses.append(f"round {number}, thread {i}: another {kind}")
        if model.training != training:
            misses.append(
                f"round {number}: the model was left in {'training' if model.training else 'evaluation'} mode"
            )
            model.train(training)
    return rounds * len(questions), misses, used


def rows_of(model, processor, pictures, words, options: dict, rounds: int) -> list[dict]:
    questions = prompts(model, pictures, words)
    made = []
    for training, typed in ((False, False), (False, True), (True, False)):
        tried, misses, used = compare(model, processor, questions, options, rounds, training, typed)
        how = "a model in training mode (dropout, gradient checkpointing)" if training else "one model"
        beside = f", its tokenizer used {used:,} times by two more threads" if typed else ""
        # several things can go wrong in one round: no more misses than answers are counted
        made.append(
            row(
                f"answers of {THREADS} threads on {how} equal those one after another",
                tried,
                misses[:tried],
                f"{rounds} rounds{beside}",
            )
        )
    return made


def run(folder: Path, quick: bool, seed: int) -> list[dict]:
    from dreamllm_edu.data.tasks import load
    from dreamllm_edu.data.world import World
    from dreamllm_edu.models.dreamllm import DreamLLM
    from dreamllm_edu.models.dreamllm.weights import mini_processor

    torch.set_num_threads(1)
    world = World()
    refs = [part["picture"] for _, recipe in zip(range(40), load("pairs", "train", world)) for part in recipe["parts"]]
    pictures = [world.picture(ref) for ref in list(dict.fromkeys(filter(None, refs)))[:5]]
    model, processor = DreamLLM.from_pretrained("mini"), mini_processor()
    words = ["fox in OpenMoji style:", "User: What is this?\nAssistant:", "The owl is a bird", "A drawing of"]
    options = {"max_new_tokens": 24, "max_pictures": 1, "num_inference_steps": 4}
    return rows_of(model, processor, pictures, words, options, 2 if quick else 12)
