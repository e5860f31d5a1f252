"""The application around the commands: errors in one sentence, and options in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from .. import __version__
from ..data import DataError
from ..pretrained import ModelFileError

EXTRAS = (
    *("sklearn", "pandas", "pyarrow", "matplotlib", "torchvision", "PIL", "soundfile", "tokenizers", "Bio"),
    *("fastapi", "uvicorn", "prometheus_client", "python_multipart", "opacus", "captum"),
)


class OneSentenceErrors(TyperGroup):
    """Turns the errors that users can cause into one sentence and exit code 2; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (DataError, ModelFileError, FloatingPointError) as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            message = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        typer.echo(f"fastenc: {message}", err=True)
        raise typer.Exit(2)


def make_app(commands: Iterable[Callable[..., None]]) -> typer.Typer:
    """The program with these commands, each called as its function is."""
    app = typer.Typer(
        cls=OneSentenceErrors,
        help="Train encoders on tables and arrays, turn rows into vectors, and see how good the vectors are.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(root)
    for command in commands:
        app.command(command.__name__.replace("_", "-"))(grouped(command))
    return app


def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by the options that are its fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))
            continue
        of_fields = get_type_hints(kind, include_extras=True)
        groups[name] = (kind, [field.name for field in fields(kind)])
        parameters += [
            inspect.Parameter(
                field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name]
            )
            for field in fields(kind)
        ]

    def flat(**values: Any) -> None:
        for group, (kind, names) in groups.items():
            values[group] = kind(**{name: values.pop(name) for name in names})
        command(**values)

    flat.__doc__ = command.__doc__
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat
