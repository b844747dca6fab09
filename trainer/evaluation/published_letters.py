"""The five sentences of the published system, and what its models answered, letter for letter.

Facts from its results table (sampled with `do_sample=True`, `max_new_tokens=100`), with the bold of the
substituted letters taken off. Odd letters, lost letters and the written-out `\\n` are as published.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishedLetters:
    """One row of the table: the sentence, and the answers before training, after SFT and after DPO."""

    source: str
    base: str
    sft: str
    dpo: str


PUBLISHED: tuple[PublishedLetters, ...] = (
    PublishedLetters(
        source="Хитрую сороку поймать морока, А сорок сорок — сорок морок.",
        base=(
            "Хитрую сороку поймать морока, А сорок сорок — сорок морок.\\n\\n## Hint\\n\\nThe first "
            "letter of the answer is the first letter of the text.\\n\\n## Solution\\n\\nThe answer "
            "is:\\n\\nХитрую сороку поймать морока, А сорок сорок — сорок морок."
        ),
        sft="Һитрую cорокy поймать морока, А cорок cорок — cорок морок.",
        dpo="Хытрyу сoрoкy пoймать мoрокa, А coрoкc coрoкc — coрoкc мoрокa.",
    ),
    PublishedLetters(
        source=(
            "Осип охрип, а Архип осип. Охрип Осип, а осип Архип. Осип Архип, а Осип охрип. Архип "
            "охрип, а Осип осип."
        ),
        base=(
            "Осип охрип, а Архип осип. Охрип Осип, а осип Архип. Осип Архип, а Осип охрип. Архип "
            "охрип, а Осип осип.\\n\\n## See also\\n\\n* Russian orthography\\n* Russian phonology\\n* "
            "Russian phonotactics\\n* Russian phonemics\\n* Russian phonology"
        ),
        sft=(
            "Оcип охрип, а Архип оcип. Охрип Оcип, а оcип Архип. Оcип Архип, а Оcип охрип. Архип "
            "охрип, а Оcип оcип."
        ),
        dpo=(
            "Оcп oхрип, а Архип ocп. Охрип Оcп, а ocп Архип. Оcп Архип, а Оcп oхрип. Архип oхрип, а Оcп ocп."
        ),
    ),
    PublishedLetters(
        source="You’re yacking and yawning and unusually annoying",
        base="\\\\begin{code}\\nYou’re yacking and yawning and unusually annoying\\n\\\\end{code}",
        sft="ыacking and уawning and unusuallу annoуing",
        dpo="Юaсking and уawning and unusuallу annoуing",
    ),
    PublishedLetters(
        source="The coat from the coast cost more than the most.",
        base="The coat from the coast cost more than the most.",
        sft="The cоat frоm the cоast cоst mоre than the mоst.",
        dpo="The соat frоm the соast соst mоre than the mоst.",
    ),
    PublishedLetters(
        source=(
            "Из жуткого гнезда я вижу весь мир от края до края, и потому со своей высоты без "
            "малейшей тени сомнений провозглашаю, дело в шляпе!"
        ),
        base=(
            "Из жуткого гнезда я вижу весь мир от края до края, и потому со своей высоты без "
            "малейшей тени сомнений провозглашаю, дело в шляпе!"
        ),
        sft=(
            "Ыз жyткoгo гнезда я вижy весь мир от края до края, и пoтoмy сo своей высоты бeз "
            "малейшoй тeни сомнeний пoзвoзгaю, дело в шляпе!"
        ),
        dpo=(
            "Зжyткoгo гнезда я выжy весь мр oт края дo края, и пoтoмy сo свoей высoты бeз "
            "малейшoй тни сoмнeний пoзвoзглaзy, делo в шляпе!"
        ),
    ),
)
