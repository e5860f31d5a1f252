"""Lightning: a module that is fused, or that holds our models, trains, saves and loads as any other."""

import lightning
import pytest
import torch
from integrated import Net, assert_as_accurate, count_fused, fused, make, make_x, run_example
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastenc

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own call of PyTorch, and its advice about a machine for training.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval:UserWarning"
    ),
]


class Module(lightning.LightningModule):
    """The steps call the layers themselves, as small scripts do."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        net = Net()
        self.fc1, self.fc2, self.out = net.fc1, net.fc2, net.out

    def training_step(self, batch, index):
        x, target = batch
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return F.cross_entropy(self.out(x), target)

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate)


def rows(dtype=torch.float32):
    return DataLoader(TensorDataset(make_x(32).to(dtype), torch.arange(32) % 3), 8)


def trainer(folder, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def test_a_fused_module_trains_alike(tmp_path, monkeypatch):
    def run(model, dtype):
        trainer(tmp_path, limit_val_batches=0).fit(model, rows(dtype), rows(dtype))
        return list(model.parameters())

    plain = make(Module)
    model = fused(plain)
    calls = count_fused(monkeypatch)
    assert_as_accurate(run(model, torch.float32), run, plain)
    assert calls == [2] * 8  # of each step fc1 and fc2: what takes the last layer's output is no activation


def test_a_checkpoint_of_a_fused_module(tmp_path, monkeypatch):
    model = fastenc.fuse(make(Module), inplace=True, verbose=False)
    first = trainer(tmp_path)
    first.fit(model, rows(), rows())
    first.save_checkpoint(tmp_path / "half")
    loaded = Module.load_from_checkpoint(tmp_path / "half", weights_only=True)
    assert type(loaded) is Module
    assert loaded.hparams.rate == 0.1
    again = type(model).load_from_checkpoint(tmp_path / "half", weights_only=True)  # the fused class
    calls = count_fused(monkeypatch)
    again.training_step(next(iter(rows())), 0)
    assert calls == [2]
    for value, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other)
    resumed, whole = fused(make(Module, 1)), fused(make(Module))
    trainer(tmp_path, max_epochs=4).fit(resumed, rows(), rows(), ckpt_path=tmp_path / "half", weights_only=True)
    trainer(tmp_path, max_epochs=4).fit(whole, rows(), rows())
    for value, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, other)


def test_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_example("Lightning")
    assert names["trainer"].global_step == 2 * 3
