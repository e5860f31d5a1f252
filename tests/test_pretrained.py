import errno
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastenc import AutoEncoder, Classifier, Encoder, Regressor, files, pretrained
from fastenc.loading import load_pretrained
from fastenc.pretrained import ModelFileError, load_preprocessing


def small_encoder(value: float | None = None) -> Encoder:
    model = Encoder(3, (4, 2), activation="tanh", final_activation="identity", dropout=0.25)
    if value is not None:
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
    return model


MODELS = {
    "Encoder": lambda: small_encoder(),
    "no bias": lambda: Encoder(3, (4, 2), bias=False),
    "AutoEncoder": lambda: AutoEncoder(small_encoder(), "sigmoid"),
    "Classifier": lambda: Classifier(small_encoder(), 5),
    "Regressor": lambda: Regressor(small_encoder(), 3),
}


def assert_same(loaded: nn.Module, saved: nn.Module) -> None:
    assert type(loaded) is type(saved)
    assert loaded.get_config() == saved.get_config()
    loaded_state, saved_state = loaded.state_dict(), saved.state_dict()
    assert list(loaded_state) == list(saved_state)
    for name, tensor in saved_state.items():
        assert loaded_state[name].dtype == tensor.dtype
        assert torch.equal(loaded_state[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, dtype):
    saved = MODELS[name]().to(dtype)
    saved.save_pretrained(tmp_path / "deep" / "model")
    random_state = torch.get_rng_state()
    for loaded in (type(saved).from_pretrained(tmp_path / "deep" / "model"), load_pretrained(tmp_path / "deep/model")):
        assert_same(loaded, saved)
        assert not any(module.training for module in loaded.modules())
        assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_saving_leaves_the_model_as_it_was_and_two_saves_are_the_same_bytes(tmp_path):
    model = small_encoder()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert model.training
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]


def test_a_loaded_model_outlives_its_file(tmp_path):
    model = small_encoder()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # in place: what a memory map would show
    assert_same(loaded, model)


def test_file_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        small_encoder().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_tied_parameters_are_written_once_and_tied_again(tmp_path):
    model = Encoder(4, (4, 4, 4))
    model.layers[2].weight = model.layers[0].weight
    model.save_pretrained(tmp_path)
    assert "layers.2.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    assert_same(loaded, model)
    assert loaded.layers[2].weight is loaded.layers[0].weight
    assert loaded.layers[1].weight is not loaded.layers[0].weight


def test_parameters_that_are_views_of_one_storage(tmp_path):
    model = Encoder(4, (4, 4))
    whole = torch.arange(32.0).view(8, 4)
    model.layers[0].weight = nn.Parameter(whole[:4])
    model.layers[1].weight = nn.Parameter(whole[:4].t())  # overlapping, transposed
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_preprocessing_comes_back_and_goes(tmp_path):
    model = small_encoder()
    preprocessing = {"mean": [0.1, 1e-300, -0.0], "names": ["größe", "b"], "by number": {"10": 1, "9": None}}
    model.save_pretrained(tmp_path, preprocessing=preprocessing)
    assert load_preprocessing(tmp_path) == preprocessing
    assert json.loads((tmp_path / "preprocessing.json").read_text()) == preprocessing
    assert json.loads((tmp_path / "config.json").read_text()) == {"class": "Encoder", **model.get_config()}
    model.save_pretrained(tmp_path)
    assert load_preprocessing(tmp_path) is None
    assert not (tmp_path / "preprocessing.json").exists()


def test_the_readable_copies_are_never_read(tmp_path):
    model = small_encoder()
    model.save_pretrained(tmp_path, preprocessing={"a": 1})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessing.json").unlink()
    assert_same(load_pretrained(tmp_path), model)
    assert load_preprocessing(tmp_path) == {"a": 1}


@pytest.mark.parametrize(
    "bad", [{"a": float("nan")}, {"a": torch.zeros(1)}, {"a": {1, 2}}], ids=["nan", "tensor", "set"]
)
def test_preprocessing_that_is_not_json_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ModelFileError, match="what JSON can hold"):
        small_encoder().save_pretrained(tmp_path / "model", preprocessing=bad)
    assert not (tmp_path / "model").exists()


def test_a_model_that_its_config_does_not_describe_is_refused(tmp_path):
    model = small_encoder()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ModelFileError, match=r"no longer what its config describes: extra\.weight is not part of it"):
        model.save_pretrained(tmp_path)
    model = small_encoder()
    model.layers[0].weight = nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(ModelFileError, match=r"layers\.0\.weight is \[4, 7\], not \[4, 3\]"):
        model.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_subclass_is_saved_under_its_own_name(tmp_path):
    class MyEncoder(Encoder):
        pass

    MyEncoder(3, (2,)).save_pretrained(tmp_path)
    assert type(MyEncoder.from_pretrained(tmp_path)) is MyEncoder
    for load in (load_pretrained, Encoder.from_pretrained):
        with pytest.raises(ModelFileError, match=r"class MyEncoder; load it with MyEncoder\.from_pretrained"):
            load(tmp_path)


def test_the_wrong_class_is_named(tmp_path):
    AutoEncoder(small_encoder()).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"class AutoEncoder; load it with AutoEncoder\.from_pretrained"):
        Encoder.from_pretrained(tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ModelFileError, match=r"there is no folder .*absent"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(ModelFileError, match=r"there is no model\.safetensors in"):
        load_preprocessing(tmp_path)
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ModelFileError, match="a file; give a folder"):
            small_encoder().save_pretrained(folder)
    assert (tmp_path / "file").read_text() == "text"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize("load", [load_pretrained, load_preprocessing, Encoder.from_pretrained])
def test_a_pickle_is_refused(tmp_path, load):
    file = tmp_path / "model.safetensors"
    writers = [
        lambda: torch.save(Bomb(), file),
        lambda: torch.save(Bomb(), file, _use_new_zipfile_serialization=False),
        *(lambda p=protocol: file.write_bytes(pickle.dumps(Bomb(), p)) for protocol in range(2, 6)),
    ]
    for write in writers:
        write()
        with pytest.raises(ModelFileError, match="is a pickle, which can run code"):
            load(tmp_path)
    file.write_bytes(pickle.dumps(Bomb(), 0))  # text: only safetensors can tell that this is not its own
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        load(tmp_path)


def test_a_model_is_not_taken_for_a_pickle(tmp_path):
    """The first byte is the low byte of the header's length, which can be a pickle's 0x80."""
    first_bytes = set()
    for length in range(0, 256, 8):
        small_encoder().save_pretrained(tmp_path, preprocessing={"": "x" * length})
        first_bytes.add((tmp_path / "model.safetensors").read_bytes()[0])
        load_pretrained(tmp_path)
    assert 0x80 in first_bytes


def rewrite(folder: Path, **changes) -> None:
    """Change the record of a saved model and put the checksum right."""
    file = folder / "model.safetensors"
    with pretrained.safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["fastenc"])
    record.update(changes)
    record.pop("sha256")
    record["sha256"] = files.text_digest(files.canonical(record))
    save_file(load_file(file), file, {"fastenc": json.dumps(record)})


def test_other_files_and_versions(tmp_path):
    small_encoder().save_pretrained(tmp_path)
    rewrite(tmp_path, format_version=2)
    with pytest.raises(ModelFileError, match="has format version 2 and this fastenc reads 1; upgrade fastenc"):
        load_pretrained(tmp_path)
    rewrite(tmp_path, format_version=1, config={"in_features": 3, "rings": 2})
    with pytest.raises(ModelFileError, match=r"its config does not build Encoder .*rings.*load it with the version"):
        load_pretrained(tmp_path)
    rewrite(tmp_path, config={"in_features": 3, "widths": [4, 2, 2]})
    with pytest.raises(ModelFileError, match=r"does not fit its own config: layers\.2\.weight is missing"):
        load_pretrained(tmp_path)
    rewrite(tmp_path, config={"in_features": 3, "widths": [4]})
    with pytest.raises(ModelFileError, match=r"layers\.1\.\w+ is not part of it"):
        load_pretrained(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="was not written by fastenc"):
        load_pretrained(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    small_encoder().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 5), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match="truncated or damaged"):
            load_pretrained(tmp_path)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        load_pretrained(tmp_path)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    model = Encoder(3, (2,))
    model.save_pretrained(tmp_path, preprocessing={"mean": [0.5]})
    file = tmp_path / "model.safetensors"
    whole = bytearray(file.read_bytes())
    refused = loaded = 0
    for position in [*range(16), *range(16, len(whole) - 33, 3), *range(len(whole) - 33, len(whole))]:
        for bit in range(8):
            whole[position] ^= 1 << bit
            file.write_bytes(whole)
            whole[position] ^= 1 << bit
            try:
                found, preprocessing = load_pretrained(tmp_path), load_preprocessing(tmp_path)
            except ModelFileError:
                refused += 1
                continue
            loaded += 1
            assert_same(found, model)
            assert preprocessing == {"mean": [0.5]}
    assert refused > 100 * loaded


def test_a_full_disk_leaves_the_old_model_and_no_temporary(tmp_path):
    old = small_encoder()
    old.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="the file there is as it was: free some space") as caught:
            Encoder(100, (100,)).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert sorted(os.listdir(tmp_path)) == before
    assert_same(load_pretrained(tmp_path), old)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_model_and_no_temporary(tmp_path, monkeypatch, step):
    old = small_encoder()
    old.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left on device; the file there is as it was"):
            small_encoder().save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert_same(load_pretrained(tmp_path), old)


def test_if_only_the_copies_cannot_be_written_the_new_model_is_saved(tmp_path, monkeypatch):
    small_encoder(1.0).save_pretrained(tmp_path)
    new = small_encoder(2.0)
    replace = os.replace

    def full_for_copies(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full_for_copies)
        with pytest.raises(OSError, match=r"config\.json"):
            new.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), new)
    assert not list(tmp_path.glob(".*"))
