"""Reads what recipes say of models: folders, hub names, adapters, other documents' results."""

from pathlib import Path

from mergeme_ext.io.hub import cached_model, is_hub_name
from mergeme_ext.merging.spec import ModelRef
from mergeme_ext.recipes import Section, nearest

__all__ = ["ModelReader"]


class ModelReader:
    """Reads references to models.

    Args:
        documents: Names of other documents of the recipe, which go before folders and hub names.
    """

    def __init__(self, documents: set[str]):
        self.documents = documents
        self._known: dict[ModelRef, ModelRef] = {}

    def read(self, section: Section, key: str) -> ModelRef:
        """Return the model under ``key``: a text, or a mapping that says the same.

        Raises:
            RecipeError: There is no such model on this machine.
        """
        if not section.holds_mapping(key):
            return self.of_text(section, key, section.text(key))
        entry = section.section(key)
        entry.allow_only(
            ("model", "lora", "override_architecture"),
            refused={"path": "goes one level deeper, into model"},
        )
        if entry.value("override_architecture", None) is not None:
            raise entry.error(
                f"{entry.path_of('override_architecture')}: not supported; tensors are found by "
                "their names",
                "override_architecture",
            )
        path = self._place(entry, "model")
        adapter = None if entry.value("lora", None) is None else self._place(entry, "lora")
        if isinstance(path, str):
            return self._once(ModelRef(Path(path), adapter, document=path))
        return self._once(ModelRef(path, adapter))

    def _place(self, entry: Section, key: str) -> Path | str:
        """Return the folder, or the document's name, of one half of a reference's mapping."""
        revision = None
        if entry.holds_mapping(key):
            entry = entry.section(key)
            key = "path"
            entry.allow_only(("path", "revision"))
            if entry.value("revision", None) is not None:
                revision = entry.text("revision")
        text = entry.text(key)
        if revision is None and text in self.documents:
            return text
        return self._find(entry, key, text, revision)

    def of_text(self, section: Section, key: str, text: str) -> ModelRef:
        """Return the model called ``text``: MODEL[@REVISION][+ADAPTER].

        Args:
            section: Where it stands.
            key: Under which key.
            text: The value, or the part of it that matters.

        Raises:
            RecipeError: There is no such model on this machine.
        """
        if text in self.documents:
            return self._once(ModelRef(Path(text), document=text))
        if section.find_folder(text) is not None:  # even with + or @ in its name
            return self._once(ModelRef(section.find_folder(text)))
        model, plus, adapter = text.partition("+")
        found = None
        if plus:
            if not adapter:
                raise section.expect(key, "a model, or model+adapter", text)
            found = self._find(section, key, *_revision(adapter))
        if model in self.documents:
            return self._once(ModelRef(Path(model), found, document=model))
        return self._once(ModelRef(self._find(section, key, *_revision(model)), found))

    def _once(self, model: ModelRef) -> ModelRef:
        """Return the first reference that means what ``model`` means."""
        return self._known.setdefault(model, model)

    def _find(self, section: Section, key: str, text: str, revision: str | None) -> Path:
        """Return the folder of a model or adapter; a hub name's is looked up in the local cache."""
        folder = section.find_folder(text)
        where = section.path_of(key)
        if folder is not None:
            if revision is None:
                return folder
            raise section.error(
                f"{where}: {text!r} is a local folder, which has no revision {revision!r}", key
            )
        if (folder := cached_model(text, revision or "main")) is not None:
            return folder
        looked = "neither from the recipe's folder nor from here"
        if is_hub_name(text):
            looked += ", nor such a model in Hugging Face's cache"
        if revision is not None:
            looked += f" at revision {revision!r}"
        others = nearest(text, self.documents) if self.documents else ""
        raise section.error(
            f"{where}: found no folder {text!r}, {looked}; models are local folders, download one "
            f"from the hub first{others}",
            key,
        )


def _revision(text: str) -> tuple[str, str | None]:
    model, at, revision = text.partition("@")
    return model, revision if at else None
