"""Held-out questions, answered and judged, each beside its two controls.

    source.exams(names) ─► Exam: samples whose last turn is to be answered ─► pupil.answer ─► judges ─► value
                             ├─► the same questions with the images permuted ──────────────────────────► shuffled
                             └─► the most common answer to all of them ────────────────────────────────► chance

A figure means something only beside what can be had without looking. A model that ignores its images has the same `value` and
`shuffled`; a model that uses them falls to `chance` when they are permuted.

    pupil.py       a model with all that is needed to ask it something
    judges.py      what a right answer is; one `measure` for answers, captions and classes
    retrieval.py   pictures and texts that are to find each other
    filtering.py   texts of which some are wrong, and which of them a filter finds
    fewshot.py     questions after worked examples
"""
