"""llama.cpp itself, by the package llama-cpp-python: quantizing files, and computing with models.

Loaded by the fixture ``llama`` in conftest.py.
"""

import ctypes
import os
import re

import llama_cpp
import numpy as np
import torch
from llama_cpp import llama_cpp as api

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
"""Of a model: ggml's threads wait for one another in busy loops, so there should be no more of them than free cores."""
_LINE = re.compile(r"\] +(\S+) +- \[[^]]*\], type = +\S+, size = .*?->.*?\((\w+)\)")


class Llama:
    """What tests need of llama.cpp. Its log is kept instead of printed."""

    def __init__(self):
        self._log = []
        self._callback = llama_cpp.llama_log_callback(lambda level, text, data: self._log.append(text.decode()))
        llama_cpp.llama_log_set(self._callback, None)

    def quantize(self, source, destination, file_type, importance=None, dry_run=False):
        """Run llama_model_quantize; return whether it worked. ``importance`` has float32 arrays by ggml's tensor names."""
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.dry_run = file_type, 2, dry_run
        if importance:
            entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
            for entry, (name, values) in zip(entries, importance.items(), strict=False):
                entry.name, entry.size = name.encode(), values.size
                entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            params.imatrix = entries
        self._log.clear()
        paths = str(source).encode(), str(destination).encode()
        return llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0

    def planned_types(self, source, file_type, importance=None):
        """Return the types that llama_model_quantize would give, by ggml's tensor names; None when it refuses."""
        if not self.quantize(source, "", file_type, importance, dry_run=True):
            return None
        return {name: type.upper() for name, type in _LINE.findall("".join(self._log).replace("\n[", "\n] ["))}

    @staticmethod
    def perplexity(logits, tokens):
        """Return exp of the mean negative log likelihood of tokens[1:] under logits[:-1]."""
        scores = torch.from_numpy(logits[:-1]).log_softmax(dim=1)
        return float(scores[torch.arange(len(scores)), torch.tensor(tokens[1:])].double().mean().neg().exp())

    def model(self, path, context=512):
        """Load a model; raises ValueError when llama.cpp does not take it."""
        options = {"n_ctx": context, "n_batch": context, "n_threads": THREADS, "n_threads_batch": THREADS}
        return Model(llama_cpp.Llama(str(path), logits_all=True, verbose=False, **options))


class Model:
    """A loaded model."""

    def __init__(self, model):
        self._model = model

    def logits(self, tokens):
        """Return float32 (tokens, vocabulary) for a sequence from its start."""
        self._model.reset()
        self._model.eval(list(tokens))
        return np.array(self._model.scores[: len(tokens)])

    def greedy(self, tokens, count):
        """Return the ``count`` most likely tokens one after the other."""
        self._model.reset()
        self._model.eval(list(tokens))
        chosen = []
        for _ in range(count):
            chosen.append(int(self._model.scores[self._model.n_tokens - 1].argmax()))
            self._model.eval(chosen[-1:])
        return chosen

    def tokenize(self, text, add_bos=False):
        """Return the tokens of a text, special tokens recognised."""
        return self._model.tokenize(text.encode(), add_bos=add_bos, special=True)

    def close(self):
        """Free the model."""
        self._model.close()
