"""One model for many users: shared layers, and a small low-rank adapter for each, trained and served together."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastenc.data import DataError

from .activation import get_activation
from .encoder import plain_stack
from .files import separate, tensors_digest
from .functional import fused_dense
from .lora import ADAPTER, adapter_key, add_lora, read_adapters, write_adapters
from .modules import FusedDense
from .pretrained import ModelFileError

SUFFIX = ".safetensors"
_SHARED = "fastenc_shared_model"  # the digest of the shared model, in a file of adapters


class PersonalModel(nn.Module):
    """A model that all users share, frozen, and beside each of its layers a low-rank adapter (LoRA) for each user.

    Rows of several users go through together: every layer is one fused product with the shared weight for all rows and
    two small batched ones, each row with its user's adapter, before the activation:
    activation(x @ weight.T + bias + (alpha / rank) * lora_b[user] @ (lora_a[user] @ x)).

    Trained by fastenc.Trainer or any loop: only the adapters have gradients, and a user's come from that user's rows
    alone. Optimisers with momentum, Adam too, go on moving the adapters of users who have no row in a batch.

    Parameters: lora_a[i] [users, rank, K] and lora_b[i] [users, N, rank] of the i-th layer. Adding or removing a user
    makes new ones: make optimisers afterwards.

    Args:
        model: an Encoder, AutoEncoder, Classifier or Regressor. It becomes part of this, and is frozen.
        users: their names, different texts.
        rank, alpha: as of `fastenc.add_lora`, the same for all users.

    Attributes:
        users: the names, in the order of the users' numbers.

    Raises:
        ValueError: another model, a name that is there already or is empty, or a wrong rank or alpha.
    """

    def __init__(self, model: nn.Module, users: Iterable[str] = (), rank: int = 4, alpha: float = 16.0) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"the rank is {rank!r}; give a whole number of at least 1")
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha!r}; give a finite number above 0")
        self.model = model.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.users: list[str] = []
        layers = self._layers()[0]
        self._names = [name for name, module in model.named_modules() if isinstance(module, FusedDense)]
        self.lora_a = nn.ParameterList(layer.weight.new_empty(0, rank, layer.in_features) for layer in layers)
        self.lora_b = nn.ParameterList(layer.weight.new_empty(0, layer.out_features, rank) for layer in layers)
        self.add_users(users)

    @property
    def bytes_per_user(self) -> int:
        """What a user's adapters take in memory; the file of them has some hundred bytes of names more."""
        return sum(each[0].numel() * each.element_size() for each in (*self.lora_a, *self.lora_b)) if self.users else 0

    def forward(self, x: Tensor, user: Tensor | None = None) -> Tensor:
        """x [B, K] and each row's user, int64 [B] -> what the model gives, [B, ...], by each row's own adapters.

        Without `user`, the last column of x [B, K + 1] is the user's number, as `joined` makes it.

        Raises:
            DataError: there is no such user, or not one for each row.
        """
        return self._run(x, user, len(self._names))

    def encode(self, x: Tensor, user: Tensor | None = None) -> Tensor:
        """The code, [B, code size]; arguments as of `forward`."""
        encoder: Any = getattr(self.model, "encoder", self.model)
        return self._run(x, user, len(encoder.layers))

    def joined(self, x: Tensor, user: Tensor) -> Tensor:
        """x [B, K] and the users' numbers [B] in one tensor [B, K + 1]: what Trainer takes, and `forward` takes apart.

        Raises:
            DataError: more users than the dtype of x has whole numbers for.
        """
        if len(self.users) > 2 / torch.finfo(x.dtype).eps:
            raise DataError(f"{x.dtype} cannot number {len(self.users)} users; join them in float32")
        return torch.cat([x, user[:, None].to(x)], 1)

    def numbers(self, names: Iterable[str]) -> Tensor:
        """The users' numbers, int64 [names], on the model's device.

        Raises:
            DataError: there is no such user.
        """
        known = {name: number for number, name in enumerate(self.users)}
        names = list(names)
        if unknown := [name for name in names if name not in known]:
            raise DataError(f"there is no user {unknown[0]!r}; add them by add_users")
        device = self.lora_a[0].device
        return torch.tensor([known[name] for name in names], dtype=torch.int64, device=device)

    @torch.no_grad()
    def add_users(self, names: Iterable[str]) -> None:
        """Give new users adapters that change nothing yet: lora_a drawn as a Linear's weight, lora_b zero."""
        names = list(names)
        for place, name in enumerate(names):
            if not isinstance(name, str) or not name or name in self.users or name in names[:place]:
                raise ValueError(f"the user {name!r} is there already, or no name; give each user a text of its own")
        for layer in range(len(self.lora_a)):
            a, b = self.lora_a[layer], self.lora_b[layer]
            new_a = a.new_empty(len(names), *a.shape[1:])
            for each in new_a:
                nn.init.kaiming_uniform_(each, a=math.sqrt(5))
            self.lora_a[layer] = nn.Parameter(torch.cat([a, new_a]))
            self.lora_b[layer] = nn.Parameter(torch.cat([b, b.new_zeros(len(names), *b.shape[1:])]))
        self.users += names

    @torch.no_grad()
    def remove_user(self, name: str) -> None:
        """Forget a user; those after it have numbers one less. A file of its adapters stays where it is.

        Raises:
            DataError: there is no such user.
        """
        number = int(self.numbers([name])[0])
        kept = [each for each in range(len(self.users)) if each != number]
        for adapters in (self.lora_a, self.lora_b):
            for layer in range(len(adapters)):
                adapters[layer] = nn.Parameter(adapters[layer][kept])
        del self.users[number]

    def alone(self, name: str) -> nn.Module:
        """A copy of the model with this user's adapters: `fastenc.merge_lora` makes it a plain one, to be saved."""
        tensors = self._tensors(name)
        model = add_lora(copy.deepcopy(self.model), self.rank, self.alpha)
        model.load_state_dict(tensors, strict=False)
        return model

    def save_user(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write a user's adapters to a safetensors file, which `fastenc.load_lora` reads as well.

        Raises:
            DataError: there is no such user.
            OSError: the file cannot be written; what was there before stays.
        """
        settings = {"rank": self.rank, "alpha": self.alpha, "dropout": 0.0}
        write_adapters(Path(path), self._tensors(name), settings, {_SHARED: self._digest()})

    def save_users(self, folder: str | os.PathLike[str]) -> None:
        """Write USER.safetensors of each user to a folder, made if absent; characters such as / are written as %2F.

        The shared model is not written: `model.save_pretrained` does it, once.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.users:
            self.save_user(name, folder / f"{quote(name, safe='')}{SUFFIX}")

    @torch.no_grad()
    def load_user(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Add a user, or give one that is there other adapters, from the file of `save_user` or `fastenc.save_lora`.

        Args:
            name: of the user; None for that of the file.

        Raises:
            ModelFileError: as `fastenc.load_lora`; also adapters of another rank or alpha, or that were trained beside
                another shared model. (A file of save_lora does not say beside which.)
        """
        path = Path(path)
        layers = dict(zip(self._names, self._layers()[0], strict=True))
        settings, tensors, metadata = read_adapters(path, layers)
        if (settings["rank"], settings["alpha"]) != (self.rank, self.alpha):
            raise ModelFileError(
                f"{path} has adapters of rank {settings['rank']} and alpha {settings['alpha']:g} and these are of "
                f"{self.rank} and {self.alpha:g}; give all users the same"
            )
        shared = self._digest()
        if metadata.get(_SHARED, shared) != shared:
            raise ModelFileError(f"{path} was trained beside another shared model; load that one, or train it again")
        name = unquote(path.name.removesuffix(SUFFIX)) if name is None else name
        if name not in self.users:
            self.add_users([name])
        number = self.users.index(name)
        for layer, of_layer in enumerate(self._names):
            for key, adapters in zip(ADAPTER, (self.lora_a, self.lora_b), strict=True):
                adapters[layer][number].copy_(tensors[adapter_key(of_layer, key)])

    @classmethod
    def load(cls, model: nn.Module, folder: str | os.PathLike[str]) -> PersonalModel:
        """The shared model with all users of a folder that `save_users` wrote, by the order of their files' names.

        Raises:
            ModelFileError: the folder has no such files, or one does not fit: as `load_user`.
        """
        files = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not files:
            raise ModelFileError(f"there is no {SUFFIX} file in {folder}; give the folder that save_users wrote")
        settings = read_adapters(files[0], {name: m for name, m in model.named_modules() if isinstance(m, FusedDense)})[
            0
        ]
        made = cls(model, rank=settings["rank"], alpha=settings["alpha"])
        for file in files:
            made.load_user(file)
        return made

    def extra_repr(self) -> str:
        return f"users={len(self.users)}, rank={self.rank}, alpha={self.alpha:g}"

    def _layers(self) -> tuple[list[FusedDense], list[float]]:
        """The layers, and the dropout after each as it is now."""
        stack = plain_stack(self.model)
        if stack is None:
            raise ValueError(
                f"{type(self.model).__name__} is no Encoder, AutoEncoder, Classifier or Regressor of fastenc whose "
                "layers run one after another, without hooks; adapters of users are for these"
            )
        return stack

    def _run(self, x: Tensor, user: Tensor | None, depth: int) -> Tensor:
        if user is None:
            x, user = x[:, :-1], x[:, -1].long()
        self._check(x, user)
        layers, dropouts = self._layers()
        for layer, a, b, drop in zip(layers[:depth], self.lora_a, self.lora_b, dropouts, strict=False):
            shared = fused_dense(x, layer.weight, layer.bias, "identity")
            own = torch.bmm(b[user], torch.bmm(a[user], x[:, :, None]))[:, :, 0]
            x = get_activation(layer.activation).forward(shared + (self.alpha / self.rank) * own)
            x = F.dropout(x, drop) if drop > 0.0 else x
        return x

    def _check(self, x: Tensor, user: Tensor) -> None:
        if x.ndim != 2 or user.shape != (len(x),):
            raise DataError(
                f"x has shape {list(x.shape)} and user {list(user.shape)}; give [rows, features] and [rows]"
            )
        if len(user) and not 0 <= int(user.min()) <= int(user.max()) < len(self.users):
            raise DataError(
                f"there are users 0 to {len(self.users) - 1}, and the numbers given are {int(user.min())} to "
                f"{int(user.max())}; take them from numbers(names)"
            )

    def _tensors(self, name: str) -> dict[str, Tensor]:
        number = int(self.numbers([name])[0])
        return {
            adapter_key(of_layer, key): adapters[layer][number].detach().clone()
            for layer, of_layer in enumerate(self._names)
            for key, adapters in zip(ADAPTER, (self.lora_a, self.lora_b), strict=True)
        }

    def _digest(self) -> str:
        return tensors_digest(separate({name: tensor.detach() for name, tensor in self.model.state_dict().items()}))
