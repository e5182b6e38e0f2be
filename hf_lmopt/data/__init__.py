"""Text for training: documents out of files, a tokenizer out of documents, blocks out of tokens."""

from hf_lmopt.data.documents import clean_wikitext, count_words, read_documents, split_text, split_wikitext
from hf_lmopt.data.packing import PackedDocuments, check_packing, collate_packed, encode_documents
from hf_lmopt.data.tables import read_text
from hf_lmopt.data.tokenizer import build_tokenizer


__all__ = [
    "read_documents",
    "read_text",
    "split_text",
    "split_wikitext",
    "clean_wikitext",
    "count_words",
    "build_tokenizer",
    "encode_documents",
    "PackedDocuments",
    "collate_packed",
    "check_packing",
]
