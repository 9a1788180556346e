"""Text in, batches out: sources, tokenisers, packing, masking, order."""

from distill.corpus.batches import Batch, Batches, unpack
from distill.corpus.masking import mlm
from distill.corpus.order import Order
from distill.corpus.preparation import prepare
from distill.corpus.store import Corpus, open

__all__ = ["Batch", "Batches", "Corpus", "Order", "mlm", "open", "prepare", "unpack"]
