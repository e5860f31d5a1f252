"""The few tests that tell whether an installation works: the kernels are there, are right, train and encode."""

import pytest
import torch
from accuracy import DTYPES, PATHS, assert_as_accurate, draw

from fastenc import AutoEncoder, Encoder, Trainer, explain, load_pretrained
from fastenc.activation import ACTIVATIONS


def test_the_kernels_run_by_themselves():
    found = explain(Encoder(64), torch.rand(32, 64))
    assert found.backends == ("cpu",), str(found)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_match_pytorch(path, dtype):
    for activation in ACTIVATIONS:
        assert_as_accurate([draw(67, (129, 65), activation, dtype, seed=seed) for seed in range(4)])


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_stacks_match_pytorch(path):
    assert_as_accurate([draw(33, (70, 128, 64, 32, 16), "relu", seed=seed) for seed in range(4)])


def test_an_autoencoder_trains_encodes_and_is_loaded_again(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(256, 2) @ torch.rand(2, 20)  # 20 columns that say what 2 numbers do
    model = AutoEncoder(Encoder(20, (32, 4), activation="tanh", final_activation="identity"))
    trainer = Trainer(model, lr=1e-2, seed=0)
    trainer.fit(x, epochs=20, verbose=False)
    assert trainer.evaluate(x)["loss"] < x.var(dim=0).mean() / 10  # what the columns' means leave
    codes = trainer.encode(x)
    assert codes.shape == (256, 4)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load_pretrained(tmp_path / "model").encode(x), torch.as_tensor(codes))
