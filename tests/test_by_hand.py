"""The functions on which everything else rests, on numbers that can be computed on paper. Each assertion fails when one
line of its function is changed."""
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from dreamllm_edu.data.lanes import lanes_of, virtual_shards
from dreamllm_edu.documents.document import Document
from dreamllm_edu.documents.formats import document_from_json, document_from_markdown
from dreamllm_edu.evaluation.intervals import by_topic, interval
from dreamllm_edu.evaluation.judge import Judge, judge_pictures
from dreamllm_edu.models.dreamllm.generation import Feeder, Row, sample_tokens, stream_text
from dreamllm_edu.models.dreamllm.queries import slots_after, splice
from dreamllm_edu.parts.denoising import denoising_loss, draw_timesteps, min_snr_weights
from dreamllm_edu.parts.diffusion import guided_output, sample_latents
from dreamllm_edu.parts.language import llama_config
from dreamllm_edu.parts.tokenizer import caption_ids, encode_text
from dreamllm_edu.sequences import Sequence, first_fit, packed_rows
from dreamllm_edu.training.batches import Item, pack_items
from dreamllm_edu.training.checkpoint import last_checkpoint, read_share, save_checkpoint, whole_checkpoint
from dreamllm_edu.training.features import FeatureStore
from dreamllm_edu.training.fit import average_into, learning_rate_at, update
from dreamllm_edu.training.strategies import Share, Strategy

from conftest import picture


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


# ---------------------------------------------------------------- tokens and slots


def test_slots_after():
    ids = torch.tensor([[9, 1, 0, 0], [1, 0, 0, 9]])
    rows, columns = slots_after(ids, 1, 2)
    assert rows.tolist() == [[0, 0], [1, 1]] and columns.tolist() == [[2, 3], [1, 2]]
    with pytest.raises(ValueError, match="cut at token 4"):
        slots_after(ids, 1, 3)
    assert [tuple(x.shape) for x in slots_after(ids, 7, 3)] == [(0, 3), (0, 3)]


def test_splice():
    embeddings, values = torch.zeros(2, 3, 2, requires_grad=True), torch.ones(1, 2, 2, dtype=torch.float64)
    values.requires_grad_()
    out = splice(embeddings, torch.tensor([[1, 1]]), torch.tensor([[0, 1]]), values)
    assert out[..., 0].tolist() == [[0, 0, 0], [1, 1, 0]] and out.dtype == torch.float32
    out.sum().backward()
    assert values.grad.eq(1).all() and embeddings.grad[..., 0].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_encode_text_and_caption_ids(tokenizer):
    assert min(encode_text(tokenizer, "<s></s><dream_start><image_patch>")) > 8, "no id of a special token"
    ids, mask = caption_ids(tokenizer, ["", "a red cat a red cat"], length=5)
    assert ids[0].tolist() == [1, 2, 0, 0, 0] and mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert ids[1].tolist() == [1, *encode_text(tokenizer, "a red cat a red cat")[:3], 2]


def test_sample_tokens():
    logits, all_of_them = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(300, 3), torch.ones(300, 3, dtype=torch.bool)
    for top_p, chosen in ((0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2})):  # the token that crosses top_p is kept
        assert set(sample_tokens(logits, all_of_them, 1.0, top_p, generators(300)).tolist()) == chosen, top_p
    without = all_of_them.clone()
    without[:, 0] = False
    assert sample_tokens(logits, without, 0.0, 1.0, generators(300)).eq(1).all()
    share = sample_tokens(logits, all_of_them, 0.5, 1.0, generators(300)).eq(0).float().mean()
    assert abs(share - 0.25 / 0.38) < 0.1, "probabilities to the power 1 / temperature"


def test_a_row_and_what_its_callback_receives():
    assert Row([]).writing and not any(r.writing for r in (Row([1]), Row([], done=True), Row([], dreaming=True)))
    received, row = [], Row([])
    for text in ("a", "a b", "a b", "a bc"):
        stream_text(0, row, text, lambda b, new: received.append(new))
    assert received == ["a", " b", "c"]


def test_the_feeder_counts_each_row_without_its_padding():
    """Three tokens beside one, then one beside none: a row that waits keeps its logits and its position."""
    fed = []

    def decoder(inputs_embeds, attention_mask, position_ids, **_):
        fed.append((attention_mask.tolist(), position_ids.tolist()))
        return SimpleNamespace(last_hidden_state=inputs_embeds)

    config = SimpleNamespace(text_config=llama_config(vocab_size=9, hidden=8, layers=1, heads=1, ffn=8))
    model = SimpleNamespace(
        config=config, device="cpu",
        embed=lambda ids, features: ids[..., None].float(),
        get_input_embeddings=lambda: lambda ids: ids[..., None].float(),
        language_model=SimpleNamespace(model=decoder, lm_head=lambda states: states))
    feeder = Feeder(model, [Row([]), Row([])])
    feeder.feed([[5, 6, 7], [8]], [None, None])
    assert fed[-1] == ([[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]]) and feeder.last.flatten().tolist() == [7, 8]
    feeder.feed([[], [4]], [None, None])
    assert fed[-1][0] == [[1, 1, 1, 0], [0, 0, 1, 1]] and fed[-1][1][1] == [1]
    assert feeder.last.flatten().tolist() == [7, 4] and [row.length for row in feeder.rows] == [3, 2]


# ---------------------------------------------------------------- diffusion


def unet(function):
    """A "U-Net" that applies `function(noisy, condition)`."""
    return lambda x, t, encoder_hidden_states, **_: SimpleNamespace(sample=function(x, encoder_hidden_states))


def test_denoising_loss():
    scheduler = DDPMScheduler(num_train_timesteps=10)
    latents, noise, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([1, 8])
    condition, perturbation = torch.zeros(2, 1, 1), torch.full((2, 1, 2, 2), 0.5)
    a = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    noisy = lambda e: a.sqrt() * latents + (1 - a).sqrt() * e
    loss = lambda **options: denoising_loss(unet(lambda x, c: x), scheduler, latents, condition, noise, t, **options)
    plain = (noisy(noise) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(loss(reduction="none"), plain)
    torch.testing.assert_close(loss(), plain.mean())
    torch.testing.assert_close(loss(weights=torch.tensor([0.0, 3.0])), 1.5 * plain[1])
    perturbed = (noisy(noise + 0.5) - noise).square().mean()
    torch.testing.assert_close(loss(perturbation=perturbation), perturbed)


@pytest.mark.parametrize("kind, compat, expected", [
    ("epsilon", None, [1, 1 / 2]),
    ("v_prediction", None, [0.25 / 1.25, 2 / 5]),
    ("v_prediction", "official", [1, 2 / 5]),
])
def test_min_snr_weights(kind, compat, expected):
    """Signal to noise 1/4 and 4, gamma 2."""
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([0.2, 0.8]), config=SimpleNamespace(prediction_type=kind))
    weights = min_snr_weights(scheduler, torch.tensor([0, 1]), 2.0, compat)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_draw_timesteps():
    """The mean of u^e is 1 / (e + 1)."""
    for exponent in (1.0, 0.5, 2.0):
        t = draw_timesteps(1000, 20000, torch.Generator().manual_seed(0), exponent)
        assert 0 <= t.min() and t.max() < 1000 and abs(t.double().mean() / 1000 - 1 / (exponent + 1)) < 0.01, exponent


def test_guided_output():
    null, conditional = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    both = torch.cat([null, conditional])
    torch.testing.assert_close(guided_output(both, 3.0), 3 * conditional - 2 * null)
    whole = guided_output(both, 3.0, 1.0)
    torch.testing.assert_close(whole.std(), conditional.std())
    torch.testing.assert_close(guided_output(both, 3.0, 0.5), (whole + 3 * conditional - 2 * null) / 2)


def test_sample_latents_asks_for_null_first_and_only_if_it_is_needed():
    """A network whose output is its condition: 1 for null, 2 for the condition; guidance makes 1 + s of them."""
    scheduler, asked = DDPMScheduler(num_train_timesteps=10), []

    def answer(x, condition):
        asked.append(condition.flatten().tolist())
        return torch.zeros_like(x) + condition.view(-1, 1, 1, 1)

    network = unet(answer)
    draw = lambda condition, scale: sample_latents(
        network, scheduler, torch.full((1, 1, 1), condition), torch.ones(1, 1, 1), scale, 2,
        noise=torch.zeros(1, 1, 2, 2))
    guided = draw(2.0, 3.0)
    assert asked == [[1, 2]] * 2
    asked.clear()
    torch.testing.assert_close(draw(4.0, 1.0), guided)  # 1 + 3 (2 - 1)
    assert asked == [[4]] * 2


# ---------------------------------------------------------------- packing


def test_first_fit_and_packed_rows():
    assert first_fit([3, 3, 2, 2], 5) == [[0, 2], [1, 3]] and first_fit([5, 1, 4], 5) == [[0], [1, 2]]
    rows = [Sequence([5, 6], [5, 6], [], []), Sequence([7], [7], [], []), Sequence([8], [-100], [], [])]
    laid = packed_rows(rows, [[0, 1], [2]], 9)
    assert laid["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert laid["labels"].tolist() == [[-100, 6, -100], [-100, -100, -100]]
    assert laid["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_pack_items_keeps_pictures_beside_their_blocks():
    """Three documents, of which the third one stands in the first row, so before the second; a and c have stored
    features, b has pixels."""
    def item(name, length, **tables):
        row = Sequence([1] * length, [-100] * (length - 1) + [1], [], [name])
        return Item(row, f"corpus {name}", name, (0, 0), {"noise": torch.tensor([float(ord(name))])}, **tables)

    number = lambda x: {"targets": torch.tensor([x])}
    items = [item("a", 100, stored=number(1.0)), item("b", 101, pixels=number(2.0)), item("c", 28, stored=number(3.0))]
    layout = SimpleNamespace(pad_token_id=0, max_length=128)
    batch = pack_items(items, layout, 128, extra=[Sequence([4], [-100], [], [])])
    assert batch.names == ["a", "c", "b"] and batch.corpus_of_picture == ["corpus a", "corpus c", "corpus b"]
    assert batch.random["noise"].tolist() == [97, 99, 98] and batch.corpus_of_token == batch.corpus_of_picture
    encoded = torch.cat([batch.stored["targets"], batch.pixels["targets"]])
    assert encoded[batch.places["targets"]].tolist() == [1, 3, 2]
    assert batch.input_ids[1, 101] == 4, "the extra sequence comes last"


def test_lanes_and_shards():
    assert lanes_of(1, 2, 8) == [1, 3, 5, 7] and sorted(lanes_of(0, 2, 8) + lanes_of(1, 2, 8)) == list(range(8))
    corpus = SimpleNamespace(name="c", shards=list("pqr"))
    orders = [[virtual_shards(corpus, lane, 4, epoch, 0) for lane in range(4)] for epoch in range(2)]
    for lanes in orders:
        assert sorted(sum(lanes, [])) == [(shard, stride, 2) for shard in "pqr" for stride in (0, 1)]
    assert orders[0] != orders[1], "another order in each epoch"


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("resident", [False, True])
def test_the_feature_store_gives_each_picture_its_own_row(tmp_path, resident):
    store = FeatureStore(tmp_path, "x", torch.float32, resident)
    store.add("f", ["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    store.add("f", ["a#1", "b#1"], torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    a, b, c = (SimpleNamespace(key=key) for key in "abc")
    assert store.read("f", [b, a]).tolist() == [[3, 4], [1, 2]] and store.read("f", [a, c]) is None
    assert store.missing("f", [a, c, c]) == [c] and store.missing("f", [a, c], view=1) == [c]
    drawn = {tuple(store.read("f", [b], 2, torch.Generator().manual_seed(i))[0].tolist()) for i in range(20)}
    assert drawn == {(3, 4), (7, 8)}, "both views come"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_opens_the_index_of_the_store_again(tmp_path):
    store = FeatureStore(tmp_path, "x")
    first = store.connect()
    assert store.connect() is first
    child = os.fork()
    if not child:
        os._exit(0 if store.connect() is not first else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_checkpoints(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, {"w": Share(torch.arange(4.0), 0, (4,))}, {"step": step}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]
    newest = tmp_path / "step-00000005"
    assert whole_checkpoint(newest)["state"]["step"] == 5
    (file,) = newest.glob("*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1  # as long as before
    file.write_bytes(damaged)
    messages = []
    assert last_checkpoint(tmp_path, messages.append)[1]["step"] == 4 and "cut off or changed" in messages[0]


def test_read_share_puts_the_pieces_of_other_processes_together():
    whole, pieces = torch.arange(10.0), [(0, 4), (4, 10)]
    files = [SimpleNamespace(get_slice=lambda name, a=a, b=b: whole[a:b]) for a, b in pieces]
    where = [{"w": (a, b, [10])} for a, b in pieces]
    for first, end in ((0, 10), (2, 7), (5, 9), (4, 4)):
        share = Share(torch.zeros(end - first), first, (10,))
        assert read_share(files, where, "w", share).tolist() == whole[first:end].tolist()
    assert read_share(files, where, "w", Share(torch.zeros(5), 0, (5,))) is None, "another tensor"


# ---------------------------------------------------------------- learning


def test_learning_rate_at():
    rates = [learning_rate_at(step, 12, 8.0, 4) for step in range(13)]
    assert rates[:5] == [2, 4, 6, 8, 8] and rates[8] == pytest.approx(4) and rates[12] == pytest.approx(0)
    assert rates[6] == pytest.approx(4 * (1 + math.sqrt(0.5))) and learning_rate_at(0, 1, 8.0, 0) == 8


def weight(value=0.0):
    return torch.nn.Parameter(torch.tensor([value]))


def test_gradients_are_clipped_in_both_engines():
    p = weight()
    update(torch.optim.SGD([p], lr=1.0), [p], 10 * p.sum(), clip_norm=2.0)
    assert p.item() == pytest.approx(-2)
    q, engine = weight(), Strategy()
    engine.attach(torch.optim.SGD([q], lr=1.0), [q])
    q.grad = torch.tensor([10.0])
    assert engine.step(clip_norm=2.0) == 10 and q.item() == pytest.approx(-2)
    q.grad = torch.tensor([math.inf])
    assert not math.isfinite(engine.step(clip_norm=2.0)) and q.item() == pytest.approx(-2), "left as it was"


def test_average_into():
    slow, fast, still = (torch.nn.Linear(1, 1) for _ in range(3))
    with torch.no_grad():
        for module, value in ((slow, 1.0), (fast, 2.0), (still, 1.0)):
            for p in module.parameters():
                p.fill_(value)
    average_into(slow, fast, 0.9)
    assert slow.weight.item() == pytest.approx(1.1)
    average_into(still, fast.requires_grad_(False), 0.9)
    assert still.weight.item() == 1, "what is frozen is not averaged"


# ---------------------------------------------------------------- measuring


def test_interval():
    half = interval([0.0, 1.0] * 50)  # standard error 0.05
    assert half["value"] == 0.5 and half["n"] == 100
    assert half["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert half["high"] == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    assert interval([True] * 10) == {"value": 1, "low": 0.025 ** 0.1, "high": 1, "n": 10}
    assert interval([False] * 10) == {"value": 0, "low": 0, "high": 1 - 0.025 ** 0.1, "n": 10}
    groups = interval([[True] * 10, [False] * 10])
    assert (groups["value"], groups["low"], groups["high"], groups["n"]) == (0.5, 0, 1, 20), "two draws, not twenty"
    assert interval([[True] * 3, [False]])["value"] == 0.75
    assert interval([[], []]) == interval([]) == {"value": None, "low": None, "high": None, "n": 0}
    articles = [[True, True], [True], [False, False]]
    assert by_topic("aab", articles) == interval([[True, True, True], [False, False]])


def test_judge_pictures():
    torch.manual_seed(0)
    judge, pictures = Judge(3, 2, widths=(4, 4, 4, 4)).eval(), [picture(i) for i in range(66)]  # more than one batch
    concepts, styles = judge_pictures(judge, pictures)
    assert concepts.shape == (66, 3) and styles.shape == (66, 2)
    for found in (concepts, styles):
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(66))
    torch.testing.assert_close(concepts[65:], judge_pictures(judge, pictures[65:])[0])
    assert [tuple(x.shape) for x in judge_pictures(judge, [])] == [(0, 3), (0, 2)]


# ---------------------------------------------------------------- documents


def test_formats_by_hand():
    text = "a\\!b<c"
    assert Document([text]).to_markdown() == "a\\\\\\!b\\<c"
    assert document_from_markdown("a\\\\\\!b\\<c").parts == [text]
    red = Image.new("RGB", (2, 2), "red")
    document = Document(["a", red, "b"], given=2)
    assert json.loads(document.to_json())["given"] == 2
    assert document_from_json(document.to_json()) == document
    assert "a&lt;b&gt;" in Document(["a<b>"]).to_html() and "<b>" not in Document(["a<b>"]).to_html()
