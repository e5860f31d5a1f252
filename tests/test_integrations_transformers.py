"""Hugging Face's Trainer and accelerate: fused models of transformers, and our own, train as unfused ones."""

import copy

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from integrated import Net, assert_as_accurate, assert_within, count_fused, fused, make, make_x, run_example
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastenc
from fastenc import Classifier, Encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def make_bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return make(lambda: BertForSequenceClassification(config))


def sentences():
    tokens = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(tokens)]


def vectors(dtype=torch.float32):
    return [{"x": x, "labels": i % 3} for i, x in enumerate(make_x(16).to(dtype))]


def arguments(folder, **options):
    options = {"max_steps": 4, "save_strategy": "no", "learning_rate": 0.1, "optim": "sgd", **options}
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def loss(logits, target, **_):
    return F.cross_entropy(logits, target)


def test_a_fused_bert_trains_alike(tmp_path, monkeypatch):
    def run(model, dtype):
        Trainer(model, arguments(tmp_path), train_dataset=sentences()).train()
        return list(model.parameters())

    plain = make_bert()
    model = fused(plain)
    calls = count_fused(monkeypatch)
    assert_as_accurate(run(model, torch.float32), run, plain)
    assert calls == [1, 1, 1] * 4  # two layers and the pooler, of each step


def test_a_fused_bert_saves_and_loads(tmp_path):
    plain = make_bert()
    fused(plain).save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is BertForSequenceClassification
    for value, other in zip(loaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, other)


def test_checkpoints_of_an_encoder(tmp_path):
    def fit(folder, steps, resume=None):
        model = make(lambda: Classifier(Encoder(6, (8, 5)), 3))
        options = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "label_names": ["labels"]}
        options = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, **options)
        trainer = Trainer(model, options, train_dataset=vectors(), eval_dataset=vectors(), compute_loss_func=loss)
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, _ = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 2)
    resumed, trainer = fit(tmp_path / "parts", 4, resume=True)
    for value, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, other)
    expected = F.cross_entropy(resumed(make_x(16)), torch.arange(16) % 3).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)


def accelerated(model, precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    x = make_x(32).to(next(model.parameters()).dtype)
    model, optimizer, rows = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(x, torch.arange(32) % 3), 8)
    )
    for x, target in rows:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), target))
        optimizer.step()
    return accelerator, model


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, monkeypatch, tmp_path):
    plain = make(Net)
    model = fused(plain)
    calls = count_fused(monkeypatch)
    accelerator, prepared = accelerated(model, precision)
    # With a precision accelerate replaces the prepared model's forward by one that calls it: fused as before.
    assert calls == [3] * 4
    expected = list(accelerated(copy.deepcopy(plain), precision)[1].parameters())
    exact = list(accelerated(copy.deepcopy(plain).double(), "no")[1].parameters())
    assert_within(list(prepared.parameters()), expected, exact)
    accelerator.save_model(prepared, tmp_path)
    loaded = Net()
    accelerate.load_checkpoint_in_model(loaded, tmp_path)
    for value, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert type(fastenc.unfuse(unwrapped)) is Net


def test_fusing_what_accelerate_has_prepared():
    """Its forward is accelerate's by then; what is inside is fused."""
    _, prepared = accelerated(make(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Net())), "bf16")
    model = fastenc.fuse(prepared, inplace=True, verbose=False)
    report = fastenc.fusion_report(model)
    assert report.fused == ("2.fc1 + relu -> 2.fc2 + relu -> 2.out",)
    assert report.left == {"0": "is in a Sequential whose forward was replaced"}


@pytest.mark.parametrize("title", ["Hugging Face Trainer", "accelerate"])
def test_example(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_example(title)
