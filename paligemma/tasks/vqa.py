"""Questions about pictures: answering them, and asking one that has a given answer."""

from paligemma.results import Answer
from paligemma.tasks.base import MaskDecoder, SizeHw, SpanScores, TokenLogprobs, language, plain_text


class _AnswerText:
    """Answers and questions are plain text."""

    def suffix(self, result: Answer | str, size_hw: SizeHw | None = None) -> str:
        """The answer's (or question's) text."""
        return plain_text(result, "answer")

    def parse(
        self,
        text: str,
        *,
        size_hw: SizeHw | None = None,
        token_logprobs: TokenLogprobs | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> Answer:
        """Answer(text without outer white space, sum of log-probabilities, raw text)."""
        return Answer(text.strip(), SpanScores(text, token_logprobs).total, raw=text)


class AnswerTask(_AnswerText):
    """`answer en where is the cat?` -> `on the sofa`."""

    name = "answer"

    def prefix(self, question: str, lang: str = "en") -> str:
        """`answer {lang} {question}`; the models were trained on English answers to questions in any language."""
        return f"answer {language(lang)} {plain_text(question, 'question')}"


class QuestionTask(_AnswerText):
    """`question en on the sofa` -> `where is the cat?`."""

    name = "question"

    def prefix(self, answer: str, lang: str = "en") -> str:
        """`question {lang} {answer}`: a question in that language to which the English answer fits."""
        return f"question {language(lang)} {plain_text(answer, 'answer')}"
