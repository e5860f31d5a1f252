"""PEFT: adapters on fused models are PEFT's own, and those on FusedDense come before its activation."""

import copy

import peft
import pytest
import torch
from integrated import (
    Net,
    assert_as_accurate,
    assert_within,
    count_fused,
    fused,
    make,
    make_x,
    run_example,
    train,
    unfused_layers,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastenc
from fastenc import Classifier, Encoder, FusedDense
from fastenc.activation import ACTIVATIONS
from fastenc.integrations.peft import LoraFusedDense, register

pytestmark = pytest.mark.usefixtures("one_thread")

# Linear layers of Net, and of the Sequential of a Classifier's layers.
OF_NET = ["fc1", "fc2", "out"]
OF_PLAIN = ["0", "2", "4"]
OF_CLASSIFIER = ["layers.0", "layers.1", "head"]


def adapted(model, targets, **options):
    """With adapters that do something."""
    options = {"r": 2, "init_lora_weights": False, **options}
    return make(lambda: get_peft_model(copy.deepcopy(model), register(LoraConfig(target_modules=targets, **options))))


def outputs(model, dtype):
    return [model(make_x(100).to(dtype))]


def assert_train_alike(model, expected):
    """In float64: the products are other ones than PEFT's, and steps make rounding errors larger."""
    sides = (train(copy.deepcopy(model).double(), torch.float64) for model in (model, expected))
    for value, other in zip(*sides, strict=True):
        torch.testing.assert_close(value, other)


def make_classifier(activation="relu", bias=True):
    return make(lambda: Classifier(Encoder(6, (8, 5), activation, bias=bias), 3))


def unfused(model):
    return unfused_layers([*model.encoder.layers, model.head])


@pytest.mark.parametrize("targets", [["fc1"], ["fc2", "out"], OF_NET], ids=str)
def test_fused_models(targets, monkeypatch):
    plain = make(Net)
    model, expected = adapted(fused(plain), targets), adapted(plain, targets)
    calls = count_fused(monkeypatch)
    assert_as_accurate(outputs(model, torch.float32), outputs, expected)
    # Runs of the layers that are nn.Linear still: PEFT's are called.
    assert calls == {1: [2], 2: [1], 3: []}[len(targets)]
    with model.disable_adapter(), expected.disable_adapter():
        assert_as_accurate(outputs(model, torch.float32), outputs, expected)
    assert_as_accurate(train(model, torch.float32), train, copy.deepcopy(expected))
    train(expected, torch.float32)
    calls.clear()
    merged = model.merge_and_unload()
    assert_as_accurate(outputs(merged, torch.float32), outputs, expected)
    assert calls == [3]


def test_fusing_after_the_adapters():
    expected = adapted(make(Net), ["fc1"])
    model = fastenc.fuse(copy.deepcopy(expected), verbose=False)
    assert fastenc.fusion_report(model).fused == ("base_model.model.fc2 + relu -> base_model.model.out",)
    assert_as_accurate(train(model, torch.float32), train, expected)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["fc1", "out"], feedforward_modules=["out"], init_ia3_weights=False),
        peft.LoHaConfig(target_modules=["fc1"], r=2, init_weights=False),
        LoraConfig(target_modules=["fc2"], r=2, init_lora_weights=False, use_dora=True),
        LoraConfig(target_modules=[], target_parameters=["fc1.weight"], r=2, init_lora_weights=False),
    ],
    ids=["IA3", "LoHa", "DoRA", "LoRA of a parameter"],
)
def test_other_methods_of_peft_on_fused_models(config):
    plain = make(Net)
    model, expected = (make(lambda m=m: get_peft_model(copy.deepcopy(m), config)) for m in (fused(plain), plain))
    assert_as_accurate(train(model, torch.float32), train, expected)
    exact = outputs(copy.deepcopy(model).double(), torch.float64)
    assert_within(outputs(model.merge_and_unload(), torch.float32), outputs(model, torch.float32), exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_adapters_come_before_the_activation(activation):
    model = make_classifier(activation)
    actual, expected = adapted(model, OF_CLASSIFIER), adapted(unfused(model), OF_PLAIN)
    assert sum(isinstance(module, LoraFusedDense) for module in actual.modules()) == 3
    assert_as_accurate(outputs(actual, torch.float32), outputs, expected)
    assert_train_alike(actual, expected)
    merged = actual.merge_and_unload()
    assert type(merged) is Classifier
    assert all(type(layer) is FusedDense for layer in [*merged.encoder.layers, merged.head])
    assert_as_accurate(outputs(merged, torch.float32), outputs, expected)


@pytest.mark.parametrize(
    "options",
    [{"lora_bias": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "orthogonal"}],
    ids=str,
)
def test_options(options):
    model = make_classifier()
    actual, expected = adapted(model, OF_CLASSIFIER, **options), adapted(unfused(model), OF_PLAIN, **options)
    assert_train_alike(actual, expected)
    assert_as_accurate(outputs(actual, torch.float32), outputs, expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer of type:UserWarning")
def test_a_bias_where_the_layer_has_none():
    model = make_classifier(bias=False)
    actual, expected = (
        adapted(m, targets, lora_bias=True) for m, targets in ((model, OF_CLASSIFIER), (unfused(model), OF_PLAIN))
    )
    assert_as_accurate(outputs(actual, torch.float32), outputs, expected)


def test_dropout_of_the_adapters_input():
    model = make_classifier()
    actual, expected = (
        adapted(m, targets, lora_dropout=0.5) for m, targets in ((model, OF_CLASSIFIER), (unfused(model), OF_PLAIN))
    )

    trained = []
    for side in (actual, expected):
        side.double()
        torch.manual_seed(0)
        trained.append(train(side, torch.float64))
        side.float()
    for value, other in zip(*trained, strict=True):
        torch.testing.assert_close(value, other)
    assert not torch.equal(actual(make_x()), actual(make_x()))
    assert_as_accurate(outputs(actual.eval(), torch.float32), outputs, expected.eval())


def test_adapters_of_another_dtype():
    """PEFT keeps adapters in float32 beside a bf16 model: put into its weights, they would be rounded away."""
    model = make_classifier("gelu").bfloat16()
    actual, expected = adapted(model, OF_CLASSIFIER), adapted(unfused(model).bfloat16(), OF_PLAIN)
    assert actual.base_model.model.head.lora_A.default.weight.dtype == torch.float32
    x = make_x().bfloat16()
    assert torch.equal(actual(x), expected(x))


def test_several_adapters():
    model = make_classifier()
    sides = []
    for m, targets in ((model, OF_CLASSIFIER), (unfused(model), OF_PLAIN)):
        side = adapted(m, targets)
        make(
            lambda s=side, t=targets: s.add_adapter(
                "second", register(LoraConfig(r=3, target_modules=t[:1], init_lora_weights=False))
            ),
            1,
        )
        sides.append(side)
    actual, expected = sides
    for names in ("second", "default", ["default", "second"]):
        for side in sides:
            side.base_model.set_adapter(names)
        assert_as_accurate(outputs(actual, torch.float32), outputs, expected)
    first = outputs(actual, torch.float32)[0]
    for side in sides:
        side.merge_adapter()
    assert_as_accurate(outputs(actual, torch.float32), outputs, expected)
    assert actual.base_model.model.head.merged
    with actual.disable_adapter():
        assert_as_accurate(outputs(actual, torch.float32), outputs, unfused(model))
    torch.testing.assert_close(outputs(actual, torch.float32)[0], first)


def test_saved_and_loaded(tmp_path):
    model = make_classifier()
    trained = adapted(model, ["layers.0"], modules_to_save=["head"])
    train(trained, torch.float32)
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"FusedDense.* is not supported"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path, config=register(LoraConfig.from_pretrained(tmp_path)))
    assert torch.equal(loaded(make_x()), trained(make_x()))


def test_what_is_not_for_fused_dense_says_so():
    model = make_classifier()
    with pytest.raises(ValueError, match=r"FusedDense.* is not supported"):
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=OF_CLASSIFIER))
    with pytest.raises(ValueError, match=r"FusedDense takes plain LoRA alone.*use_dora.*fastenc\.to_plain"):
        adapted(model, OF_CLASSIFIER, use_dora=True)
    for config in (
        peft.IA3Config(target_modules=["head"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["head"]),
    ):
        with pytest.raises((ValueError, TypeError), match="not supported"):
            get_peft_model(copy.deepcopy(model), config)
    layer = adapted(model, OF_CLASSIFIER).base_model.model.head
    with pytest.raises(ValueError, match="set_adapter instead of adapter_names"):
        layer(torch.rand(2, 5), adapter_names=["default", "default"])


def test_hooks_and_subclasses_are_refused():
    class Louder(FusedDense):
        def forward(self, x):
            return 2 * super().forward(x)

    model = adapted(nn.Sequential(Louder(6, 4)), ["0"])
    with pytest.raises(ValueError, match="this Louder has hooks, or a forward of its own"):
        model(make_x())
    model = adapted(nn.Sequential(FusedDense(6, 4)), ["0"])
    model.base_model.model[0].base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="put hooks on the adapted layer"):
        model(make_x())


def test_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_example("PEFT")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    assert type(names["merged"].encoder.layers[0]) is FusedDense
