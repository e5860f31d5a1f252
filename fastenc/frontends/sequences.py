from .reader import Reader


class SequenceReader(Reader):
    kind = "sequence"
    suffixes = (".fasta", ".fa", ".fna", ".faa",)
