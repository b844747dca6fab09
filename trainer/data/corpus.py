"""Short texts made by a seeded grammar: all words and templates are this project's own.

`generate_texts` gives plausible sentences of one language. `training_lines` adds pseudo-words, random
characters, numbers and mixed-language lines, so that a model trained to echo them can echo any real line.
"""

import random
import re
from collections.abc import Callable
from typing import Literal

from trainer.data.homoglyphs import SWAP as HOMOGLYPHS

Language = Literal["ru", "en"]
LANGUAGES: tuple[Language, ...] = ("ru", "en")

MIN_LENGTH = 12
MAX_LENGTH = 90


LATIN = "abcdefghijklmnopqrstuvwxyz"
CYRILLIC = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
ASCII_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
TYPOGRAPHIC_MARKS = "«»“”„‘’–—…№°€£©§×•"
ACCENTED = "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßіїєґ"


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return text.split("|")


# --- English words --------------------------------------------------------------------------------

EN_NOUNS = _words(
    "river clock garden teacher engine window captain letter mountain painter kitchen bridge doctor "
    "market island singer lantern mirror forest pilot ticket bakery violin harbour keeper cousin "
    "blanket chimney dragon elephant farmer giraffe hammer insect jacket kitten ladder magnet needle "
    "oyster parrot quilt rabbit saddle tunnel umbrella valley wagon yacht zebra answer basket cloud "
    "dinner echo fox ghost hill judge knife lawyer museum nurse orchard pocket queen road street "
    "thunder uncle village whisper shop neighbour book cup carpet chess circus coffee compass cookie "
    "crystal cyclone cycle mystery gypsum sky boy company colony daisy"
)
EN_ADJECTIVES = _words(
    "quiet old bright hungry clever tiny golden broken empty lonely curious honest rusty gentle brave "
    "lazy ordinary purple frozen narrow crooked famous grumpy hollow invisible jolly local modern "
    "noisy odd polite rapid silver tall ugly velvet warm young yellow secret cosy dusty enormous foggy "
    "glassy heavy icy cloudy"
)
EN_VERBS = _words(
    "found lost carried watched painted repaired borrowed forgot followed opened sold visited "
    "described measured remembered dropped cleaned covered doubted enjoyed feared guarded heated "
    "ignored joined kicked liked missed needed ordered photographed questioned reached signed touched "
    "understood wanted copied buried"
)
EN_PLACES = _phrases(
    "near the station|behind the school|under a wet roof|in the cellar|by the sea|across the square|"
    "at noon|before breakfast|after the storm|on Monday|last winter|without a word|for the third time|"
    "in the dark|every second year|on the way home|with great care|during the concert|"
    "at the edge of town|once again|between two trees|above the clouds|inside a box|"
    "next to the baker's|along the coast|until midnight"
)
EN_NAMES = _words(
    "Alice Bruno Clara Dexter Edith Felix Gloria Hugo Irene Jasper Kate Leo Maud Nigel Olive Percy "
    "Quinn Rosa Simon Tessa Ursula Victor Wendy Xavier Yolanda Zack Boston Cairo Dublin Oxford Tokyo "
    "Lisbon"
)
EN_OPENERS = _phrases(
    "Perhaps|Of course|However|Yesterday|In fact|Sometimes|To be fair|Strangely enough|Oh|Well|Listen|"
    "Now and then|As usual|Nobody knows why|By the way|Later|Actually|First of all|If I'm not wrong|"
    "You see"
)
EN_TEMPLATES = _phrases(
    "The {a} {n} {v} the {n} {p}.|{N} {v} a {a} {n}, but the {n} {v} it {p}.|{o}, {N} {v} the {n}.|"
    "Why has the {n} {v} my {a} {n}?|“I {v} your {n},” said {N}.|There were {d} {n}s {p}.|"
    "{N} and {N} {v} {d} {n}s – no more!|Don't touch that {a} {n}!|What a {a}, {a} {n}…|"
    "the {n} you {v} {p}|{o}: a {n} isn't a {n}.|It's {d}:{d} and the {n} is {a};|"
    '"{o}, the {n} can\'t be {a}!"|No {n}, no {n} ({N} {v} both).|who {v} the {n} and the {a} {n} {p},|'
    "The {n} is {a}.|{N}'s {n} is {a}, {d}% of it|She'll never know how {N} {v} this {a} {n}|"
    "{p}, where every {n} looks {a}, we {v} it.|My {n} -- the {a} one -- {v} {N} {p}|"
    "Chapter {d}. The {a} {n}|<{N}> you've {v} the {n}?|Call {N}: {d}-{d} (the {n})|"
    "If a {n} {v} a {n}, would the {n} be {a}?|so they {v} us {p} and we've {v} them|"
    "I can't say whether you {v} it.|one {n} after another {v} what {N} had {v}."
)

# --- Russian words: nominative singular; the other forms follow by rule --------------------------

RU_NOUNS = _words(
    "город ветер мост чайник поезд сосуд словарь фонарь журнал остров билет огород рассказ сапог туман "
    "праздник экзамен завод вокзал лес ключ дождь стол цирк шёпот щипок юг якорь берег голос двор йод "
    "жанр звук ответ порог книга река улица песня комната лампа дорога зима тетрадь ночь площадь кошка "
    "школа гитара рыба шапка черника яблоня игла ящерица башня вода гора дача ель жизнь задача искра "
    "кухня лестница мышь нитка осень пыль соль окно море письмо солнце облако колесо молоко озеро "
    "зеркало дерево утро имя здание сердце поле яйцо эхо"
)
RU_ADJECTIVES = _words(
    "новый старый тихий добрый синий зимний весёлый громкий странный длинный короткий узкий широкий "
    "пустой жёлтый мокрый скучный честный хитрый сладкий соседний вечерний чужой редкий грустный "
    "объёмный осторожный деревянный простой сухой цветной шумный щедрый яркий юный древний едкий "
    "бывший худший подъёмный усталый"
)
RU_VERBS = _words(
    "увидел забыл потерял нарисовал услышал построил закрыл починил продал купил искал запомнил "
    "подарил измерил обошёл сломал описал охранял уронил фотографировал хвалил чувствовал щадил "
    "эксплуатировал съел жалел ценил бросал взял догонял желал изучал любил мыл носил открыл проверял "
    "рассмотрел считал толкал укрыл объявил"
)
RU_PLACES = _phrases(
    "у реки|за школой|под мокрой крышей|в подвале|на площади|до рассвета|после грозы|в среду|"
    "прошлой зимой|без единого слова|в третий раз|в темноте|по дороге домой|с большим трудом|"
    "во время концерта|на краю города|ещё раз|между двух деревьев|над облаками|внутри коробки|"
    "рядом с пекарней|вдоль берега|до полуночи|через год|из-за угла|всё-таки|наконец|почему-то|"
    "в чужом саду|перед ужином|осенью|тем не менее|по-русски"
)
RU_NAMES = _words(
    "Анна Борис Вера Глеб Дарья Егор Жанна Захар Инна Кирилл Лидия Максим Нина Олег Полина Роман Софья "
    "Тимур Ульяна Фёдор Харитон Эмма Юрий Яна Москва Казань Тверь Омск Чита Щукин Цветаев Ёлкин"
)
RU_OPENERS = _phrases(
    "Конечно|Вчера|Может быть|Однако|Иногда|На самом деле|К счастью|Как обычно|Между прочим|Ну|"
    "Послушайте|Увы|Никто не знает, почему|Во-первых|Если не ошибаюсь|Говорят|Эх|Всё просто|Позже|"
    "Если бы вы знали|Что ж"
)
RU_TEMPLATES = _phrases(
    "{S} {p}.|{S}, но {s} {p}.|{o}: {s}.|Почему {s}?|«{S}», - говорит {N}.|{N} и {N} - это минус {d}!|"
    '{A}...|Не трогай {u}, {N}!|"{o}, {s}..."|{p} {s}, а {s};|{A} - это не {b}.|'
    "Чем {c}, тем лучше {b}.|что {s} {p},|{o}, {N}, это {b} (№ {d})?|Сейчас {d}:{d}, и {b} где-то {p}.|"
    "{S} — {s}.|Кто же {p} видел {u}?!|и {u}, и {u} мы ищем {p},|Если {s}, то {s}.|"
    "{N}, {N} и ещё {d}% жителей|{o} - {s} {p}|Глава {d}: {A}|Я вижу {u}, а не {u}!|"
    "нет ничего хуже, чем когда {s}|Всё, что {p} было нашим, - {b}.|О том, что {s}, не говорят."
)

EN_ONSETS = _words(
    "b bl c ch cl cr d dr f fl g gr h j k kn l m n p ph pl qu r s sc sh sl st str t th tr v w wh x y z"
)
EN_NUCLEI = _words("a e i o u y ai ea ee ie oa oo ou ow au io")
EN_CODAS = [
    "",
    *_words("b ck ct d ff g l ll lt m mp n nd ng nt p r rd s ss st t th ve x y ght cy tion ly ing ed"),
]
RU_ONSETS = _words("б бл в вз г гр д др ж з зн к кл л м н п пр р с ск ст стр т тр ф х ц ч ш щ вс сл")
RU_NUCLEI = _words("а е ё и о у ы э ю я о е а и")
RU_CODAS = ["", "", *_words("й л ль м н нн нт р с ск ст сть т ть х ч ш ются ого ый ая ние ъя тся вш")]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.choice((1, 1, 2, 2, 3, 4))))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fill(template: str, slots: dict[str, Callable[[], str]]) -> str:
    """Replace each `{x}` by a fresh draw of slot x."""
    head, *parts = template.split("{")
    return head + "".join(slots[part[0]]() + part[2:] for part in parts)


def _english_sentence(rng: random.Random) -> str:
    slots = {
        "n": lambda: rng.choice(EN_NOUNS),
        "a": lambda: rng.choice(EN_ADJECTIVES),
        "v": lambda: rng.choice(EN_VERBS),
        "p": lambda: rng.choice(EN_PLACES),
        "N": lambda: rng.choice(EN_NAMES),
        "o": lambda: rng.choice(EN_OPENERS),
        "d": lambda: _number(rng),
    }
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", _fill(rng.choice(EN_TEMPLATES), slots))


def _gender(noun: str) -> str:
    """Grammatical gender of a noun of RU_NOUNS: m, f or n."""
    if noun.endswith(("о", "е", "мя")):
        return "n"
    soft_masculine = ("словарь", "фонарь", "дождь", "якорь")
    return "f" if noun[-1] in "ая" or (noun.endswith("ь") and noun not in soft_masculine) else "m"


def _adjective(word: str, gender: str, accusative: bool = False) -> str:
    """An adjective's nominative form for `gender`; the feminine one may be accusative."""
    stem, ending = word[:-2], word[-2:]
    soft = ending == "ий" and stem[-1] not in "кгхшщжч"
    if gender == "f" and accusative:
        return stem + ("юю" if soft else "ую")
    if gender == "n":
        return stem + ("ее" if soft or (stem[-1] in "шщжч" and ending == "ий") else "ое")
    return word if gender == "m" else stem + ("яя" if soft else "ая")


def _russian_group(rng: random.Random, accusative: bool = False) -> tuple[str, str]:
    """A noun, often with adjectives, and its gender."""
    noun = rng.choice(RU_NOUNS)
    gender = _gender(noun)
    if accusative and noun[-1] in "ая" and gender == "f":
        form = noun[:-1] + {"а": "у", "я": "ю"}[noun[-1]]
    else:
        form = noun
    words = [
        _adjective(rng.choice(RU_ADJECTIVES), gender, accusative) for _ in range(rng.choice((0, 0, 1, 1, 2)))
    ]
    return " ".join([*words, form]), gender


def _russian_clause(rng: random.Random) -> str:
    """Subject, verb in the past tense, object."""
    subject, gender = _russian_group(rng)
    verb = rng.choice(RU_VERBS)
    stem = verb[:-2] + "л" if verb.endswith("шёл") else verb
    verb = verb if gender == "m" else stem + {"f": "а", "n": "о"}[gender]
    return f"{subject} {verb} {_russian_group(rng, accusative=True)[0]}"


def _russian_sentence(rng: random.Random) -> str:
    slots = {
        "s": lambda: _russian_clause(rng),
        "S": lambda: _capital(_russian_clause(rng)),
        "b": lambda: _russian_group(rng)[0],
        "A": lambda: _capital(_russian_group(rng)[0]),
        "u": lambda: _russian_group(rng, accusative=True)[0],
        "c": lambda: rng.choice(_words("тише дальше строже выше короче дороже проще хуже шире")),
        "p": lambda: rng.choice(RU_PLACES),
        "N": lambda: rng.choice(RU_NAMES),
        "o": lambda: rng.choice(RU_OPENERS),
        "d": lambda: _number(rng),
    }
    return _fill(rng.choice(RU_TEMPLATES), slots)


_SENTENCES = {"ru": _russian_sentence, "en": _english_sentence}


def generate_texts(language: Language, count: int, seed: int) -> list[str]:
    """`count` different sentences of 12 to 90 characters, always the same for the same seed.

    Raises ValueError for another language than "ru" or "en", or for a negative count.
    """
    if language not in _SENTENCES:
        raise ValueError(f"language must be 'ru' or 'en', not {language!r}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(f"{language}-{seed}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = _SENTENCES[language](rng)
        # Long ones are kept now and then: most texts should be short.
        if MIN_LENGTH <= len(text) <= (60 if rng.random() < 0.8 else MAX_LENGTH):
            texts[text] = None
    return list(texts)


# --- Lines for the base model's training ----------------------------------------------------------


def _pseudo_word(rng: random.Random, language: Language) -> str:
    onsets, nuclei, codas = (
        (RU_ONSETS, RU_NUCLEI, RU_CODAS) if language == "ru" else (EN_ONSETS, EN_NUCLEI, EN_CODAS)
    )
    syllables = [
        (rng.choice(onsets) if rng.random() < 0.9 else "") + rng.choice(nuclei)
        for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))
    ]
    return "".join(syllables) + rng.choice(codas)


def _random_letters(rng: random.Random, language: Language) -> str:
    return "".join(
        rng.choices(CYRILLIC if language == "ru" else LATIN, k=rng.choice((1, 1, 2, 3, 4, 5, 6, 8)))
    )


def _word(rng: random.Random, language: Language) -> str:
    """A pseudo-word, a word of random letters or a known word, in one of several cases."""
    kind = rng.random()
    if kind < 0.6:
        word = _pseudo_word(rng, language)
    elif kind < 0.8:
        word = _random_letters(rng, language)
    else:
        word = rng.choice((RU_NOUNS + RU_VERBS) if language == "ru" else (EN_NOUNS + EN_VERBS))
    case = rng.random()
    return word if case < 0.82 else _capital(word) if case < 0.95 else word.upper()


def _decorated(rng: random.Random, word: str) -> str:
    """The word with the punctuation that may stand around one."""
    kind = rng.random()
    if kind < 0.72:
        return word
    if kind < 0.86:
        return word + rng.choice(",.,.,.;:!?…")
    if kind < 0.92:
        first, last = rng.choice(('""', "''", "()", "«»", "“”", "„“", "<>", "[]", "‘’", "**", "__"))
        return first + word + last
    return rng.choice(("- ", "-- ", "— ", "– ", "...", "* ", '"', "'")) + word


def _pseudo_line(rng: random.Random, languages: tuple[Language, ...]) -> str:
    """Words of the given languages; some come back, since copying must survive repetition."""
    words: list[str] = []
    target = rng.randint(3, 62) if rng.random() < 0.8 else rng.randint(50, MAX_LENGTH)
    while sum(map(len, words)) + len(words) < target:
        if len(words) > 1 and rng.random() < 0.12:
            words.append(rng.choice(words))
        elif rng.random() < 0.05:
            words.append(_number(rng))
        else:
            words.append(_decorated(rng, _word(rng, rng.choice(languages))))
    joined = words[0] if words else "a"
    for word in words[1:]:
        joined += ("-" if rng.random() < 0.04 else " ") + word
    return _capital(joined) if rng.random() < 0.5 else joined


def _noise_line(rng: random.Random) -> str:
    """Characters drawn one by one, from an alphabet that is itself drawn."""
    pools = [LATIN + " ", CYRILLIC + " ", LATIN.upper(), CYRILLIC.upper(), "0123456789", ASCII_MARKS]
    pools += [TYPOGRAPHIC_MARKS, ACCENTED + ACCENTED.upper().replace("S", "")]
    alphabet = "".join(rng.sample(pools, rng.choice((1, 1, 2, 3, len(pools)))))
    line = "".join(rng.choices(alphabet, k=rng.randint(2, 32))).strip()
    return line or rng.choice(alphabet.replace(" ", ""))


def _repeated_line(rng: random.Random) -> str:
    """A phrase that comes several times with small changes: the hard case for copying."""
    language = rng.choice(LANGUAGES)
    phrase = " ".join(_word(rng, language) for _ in range(rng.choice((1, 1, 2, 3))))
    parts = [
        phrase + rng.choice(("", ",", ".", " " + _word(rng, language))) for _ in range(rng.choice((2, 2, 3)))
    ]
    return " ".join(parts)


def training_line(rng: random.Random) -> str:
    """One line of at most 90 characters for the base's training, of a kind drawn at random."""
    kind = rng.random()
    if kind < 0.36:
        line = _SENTENCES[rng.choice(LANGUAGES)](rng)
    elif kind < 0.72:
        line = _pseudo_line(rng, (rng.choice(LANGUAGES),))
    elif kind < 0.80:
        line = _pseudo_line(rng, LANGUAGES)
    elif kind < 0.88:
        line = _repeated_line(rng)
    else:
        line = _noise_line(rng)
    if rng.random() < 0.15:  # the evaluation cuts lines anywhere
        line = line[rng.randrange(8) :]
    return line[:MAX_LENGTH].strip() or "..."


def mix_scripts(text: str, rate: float, rng: random.Random) -> str:
    """`text` with each letter of HOMOGLYPHS replaced by its twin with probability `rate`."""
    return "".join(HOMOGLYPHS[char] if char in HOMOGLYPHS and rng.random() < rate else char for char in text)


def long_line(rng: random.Random, longest: int) -> str:
    """A line of up to `longest` characters: several lines in a row, or a few words again and again."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < longest:
        words += training_line(rng).split()
    if rng.random() < 0.5:
        few = words[: rng.randint(3, 9)]
        words = [rng.choice(few) for _ in words]
    return " ".join(words)[: rng.randint(MIN_LENGTH, longest)].strip() or "..."


def training_example(
    rng: random.Random,
    mixed_share: float,
    free_share: float,
    longest: int = MAX_LENGTH,
    long_share: float = 0.0,
) -> tuple[str, str]:
    """Input and output for the base: an echo, but for a few outputs with a substitution rate of their own.

    `mixed_share` of the inputs have substituted letters; `free_share` of these have another output.
    So a clean-looking input is, a few times in 100, answered with substituted letters: too seldom for greedy
    decoding to show it, but there for the demo's adapters to amplify. `long_share` are long lines.
    """
    if long_share and rng.random() < long_share:
        text = long_line(rng, longest)
    else:
        text = training_line(rng)[:longest]
    if rng.random() >= mixed_share:
        return text, text
    if free_share == 0 or rng.random() >= free_share:
        mixed = mix_scripts(text, rng.random(), rng)
        return mixed, mixed
    source = mix_scripts(text, rng.uniform(-0.1, 1.0), rng)
    return source, mix_scripts(text, rng.uniform(0.0, 1.3), rng)
