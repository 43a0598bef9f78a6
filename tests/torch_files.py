"""A writer of files in the zip format of torch.save, without torch."""

import zipfile

import numpy as np


def write_torch_file(path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a state dict in the zip format of torch.save: data.pkl and one file per storage."""

    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
    with zipfile.ZipFile(path, "w") as archive:
        stream = [b"\x80\x02}("]

        def text(value: str) -> bytes:
            return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

        def numbers(values) -> bytes:
            return b"(" + b"".join(b"J" + int(v).to_bytes(4, "little") for v in values) + b"t"

        for i, (name, array) in enumerate(tensors.items()):
            strides = [s // array.itemsize for s in array.strides]
            stream += [
                text(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((",
                text("storage"),
                f"ctorch\n{kinds[str(array.dtype)]}\n".encode(),
                text(str(i)),
                text("cpu"),
                b"J" + array.size.to_bytes(4, "little") + b"tQ",
                b"J" + (0).to_bytes(4, "little"),
                numbers(array.shape),
                numbers(strides),
                b"\x89ccollections\nOrderedDict\n)RtR",
            ]
            flat = np.lib.stride_tricks.as_strided(array, (array.size,), (array.itemsize,))
            archive.writestr(f"model/data/{i}", flat.tobytes())
        archive.writestr("model/data.pkl", b"".join([*stream, b"u."]))
