"""A `sentencepiece` model for `transformers`, with the ids that the library itself gives."""

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class MegalodonSentencePiece(SentencePieceBackend):
    """Ids of `tokenizer.model`; the boundary token `bos` goes before a text.

    Special tokens in a text are ordinary text, as in training.
    """

    def tokenize(self, text, **kwargs):
        """Pieces of the text as a whole."""
        del kwargs
        return self.sp_model.encode(text, out_type=str)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Puts bos before each text."""
        second = [] if token_ids_1 is None else [self.bos_token_id, *token_ids_1]
        return [self.bos_token_id, *token_ids_0, *second]

    def convert_tokens_to_string(self, tokens):
        """Text of pieces."""
        return self.sp_model.decode(tokens)
