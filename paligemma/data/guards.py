"""Words that a change of the picture would make wrong: sides (a flip), colours (a change of hue).

Every text is looked at for the words of all languages, whatever language it says it is in: a word too many costs a
flip, a word too few teaches something false. So Spanish "sol" (sun) keeps a picture from being flipped, since it is
Turkish for left. The tables cover the 35 languages of pre-training, in the forms that captions use; they are ours.
"""

import re
import unicodedata
from collections.abc import Iterable

# A star stands for any ending.
_SIDES: dict[str, str] = {
    "en": "left leftmost leftward* lefthand* leftside right rightmost rightward* righthand* rightside clockwise "
    "counterclockwise anticlockwise starboard mirrored east eastern eastward* eastbound west western westward* "
    "westbound northeast* northwest* southeast* southwest* topleft topright bottomleft bottomright upperleft "
    "upperright lowerleft lowerright",
    "ar": "*يسار* *يمين* *أيسر *أيمن *ايسر *ايمن *يسرى *يمنى",
    "bn": "বাম* বাঁ* ডান*",
    "cs": "lev* vlev* zlev* dolev* nalev* prav* vprav* zprav* doprav* naprav*",
    "da": "venstre* højre*",
    "de": "links* linke linken linker linkerhand linkes linkem rechts* rechte rechten rechter rechterhand rechtes "
    "rechtem westlich* östlich*",
    "el": "αριστερ* δεξι* δεξί*",
    "es": "izquierd* derech*",
    "fa": "چپ* راست*",
    "fi": "vasen* vasem* oikea* oikei* oikeu* myötäpäivään vastapäivään",
    "fil": "kaliwa* kanan*",
    "fr": "gauche* droit droite droites droits",
    "he": "*שמאל* *ימין* *ימני*",
    "hi": "बाएँ* बाएं* बाये* बायी* बाया* बायाँ* बायां* बायीं* बाईं* बायें* बाई बाए "
    "दाएँ* दाएं* दाये* दायी* दाया* दायाँ* दायां* दायीं* दाईं* दायें* दाई दाए दाहिन*",
    "hr": "lijev* slijev* ulijev* nalijev* desn* zdesn* udesn* nadesn*",
    "hu": "bal balra balról balján balold* jobb jobbra jobbról jobbján jobbold*",
    "id": "kiri kirinya kanan kanannya",
    "it": "sinistr* destra destre destri destro",
    "mi": "mauī katau matau",
    "nl": "links* linker* rechts* rechter*",
    "no": "venstre* høyre* høgre*",
    "pl": "lewo lewa lewą lewe lewej lewego lewy lewym lewych lewymi "
    "prawo prawa prawą prawe prawej prawego prawy prawym prawych prawymi",
    "pt": "esquerd* direit*",
    "ro": "stâng* stîng* stang* drept* dreapt*",
    "ru": "лев* слев* налев* влев* прав* справ* направ* вправ*",
    "sv": "vänster* vänstr* höger* högra",
    "sw": "kushoto kulia",
    "te": "ఎడమ* కుడి*",
    "tr": "sol sola solda soldan soldaki* soluna solunda* solundan "
    "sağ sağa sağda sağdan sağdaki* sağına sağında* sağından",
    "uk": "лів* зліва ліворуч наліво вліво прав* справа праворуч направо вправо",
    "vi": "trái phải",
}
_SIDES_ANYWHERE = "左 右 왼 오른 좌측 우측 ซ้าย ขวา"  # found inside of words: these scripts set no spaces, or no ends

# Only what a turn of the hue changes: black, white and gray stay.
_COLOURS: dict[str, str] = {
    "en": "red reds reddish green* blue* bluish yellow* orange* purple* pink* brown* cyan magenta teal turquoise "
    "violet* beige gold golden maroon navy crimson lime olive indigo scarlet lavender khaki blond* "
    "colour* color* rainbow*",
    "ar": "*احمر *اخضر *ازرق *اصفر *أحمر *حمراء *أخضر *خضراء "
    "*أزرق *زرقاء *أصفر *صفراء *برتقالي* *بنفسجي* *وردي* *بني *بنية",
    "bn": "লাল সবুজ নীল হলুদ কমলা বেগুনি গোলাপি বাদামি",
    "cs": "červen* zelen* modr* žlut* oranžov* fialov* růžov* hněd*",
    "da": "rød* grøn* blå* gul gule gult lilla lyserød* brun*",
    "de": "rot rote* grün* blau* gelb* lila violett* rosa braun*",
    "el": "κόκκιν* πράσιν* μπλε κίτριν* πορτοκαλί μωβ ροζ καφέ",
    "es": "rojo* roja* verde* azul* amarill* naranja* morad* rosa* marrón*",
    "fa": "قرمز* سبز* آبی* زرد* نارنجی* بنفش* صورتی*",
    "fi": "punai* vihre* sini* keltai* oranssi* violet* pinkki* ruske*",
    "fil": "pula pulang berde* asul* dilaw*",
    "fr": "rouge* vert verts verte vertes bleu* jaune* rose* marron*",
    "he": "*אדום *אדומ* *ירוק* *כחול* *צהוב* *כתום *סגול* *ורוד* *חום",
    "hi": "लाल हरा हरी हरे नीला नीली नीले पीला पीली पीले नारंगी बैंगनी गुलाबी भूरा भूरी भूरे",
    "hr": "crven* zelen* plav* žut* narančast* ljubičast* smeđ*",
    "hu": "piros* vörös* zöld* kék* sárga* narancs* lila* rózsaszín* barna*",
    "id": "merah* hijau* biru* kuning* oranye ungu* cokelat* coklat*",
    "it": "rosso rossa rossi rosse verde verdi blu azzurr* giall* arancion* viola* rosa marron*",
    "mi": "whero kākāriki kikorangi kōwhai",
    "nl": "rood rode groen* blauw* geel gele oranje paars* roze bruin*",
    "no": "rød* grønn* blå* gul gule gult lilla brun*",
    "pl": "czerwon* zielon* niebiesk* żółt* pomarańcz* fiolet* różow* brązow*",
    "pt": "vermelh* verde* azul* amarel* laranja* roxo* roxa* marrom",
    "ro": "roșu roșie roșii rosu verde* albastr* galben* portocaliu* mov maro",
    "ru": "красн* зелен* зелён* синий синяя синее синие синего синей голуб* желт* жёлт* "
    "оранжев* фиолетов* розов* коричнев*",
    "sv": "röd* grön* blå* gul gula gult lila rosa brun*",
    "sw": "nyekundu kijani buluu njano zambarau",
    "te": "ఎరుపు ఆకుపచ్చ నీలం పసుపు",
    "tr": "kırmızı* yeşil* mavi* sarı* turuncu* mor pembe* kahverengi*",
    "uk": "червон* зелен* синій синя синє сині синього синьої блакитн* жовт* помаранчев* фіолетов* рожев* коричнев*",
    "vi": "đỏ xanh vàng cam tím hồng nâu",
}  # fmt: skip
_COLOURS_ANYWHERE = (
    "红 紅 赤 绿 緑 綠 蓝 藍 青 黄 黃 橙 紫 粉色 ピンク 茶色 棕 褐 オレンジ 빨간 빨강 초록 파란 파랑 노란 노랑 주황 "
    "보라 분홍 갈색 แดง เขียว น้ำเงิน สีฟ้า เหลือง ส้ม ม่วง ชมพู น้ำตาล"
)  # fmt: skip


_JOINTS = re.compile(r"[_\d]+|(?<=[a-zß-öø-ÿ])(?=[A-Z])")  # of names such as left_arrow, turnRight, hand2


def _composed(text: str) -> str:
    """With every accent in its letter: the same word may be written in several ways."""
    return unicodedata.normalize("NFC", text)


def _spelled(text: str) -> str:
    """As `_composed`, and the words that a name joins apart."""
    return _JOINTS.sub(" ", _composed(text))


def _pattern(words: dict[str, str], anywhere: str) -> re.Pattern[str]:
    # Letters and their marks: \b would end a Hindi word at its vowel sign.
    end = r"(?![\w\u0900-\u0D7F])"
    starting: list[str] = []
    inside = list(map(re.escape, _composed(anywhere).split()))
    for word in sorted({word for line in words.values() for word in _composed(line).split()}):
        stem = re.escape(word.strip("*")) + ("" if word.endswith("*") else end)
        (inside if word.startswith("*") else starting).append(stem)
    # One look at what stands before for all words together: most places of a text are ruled out at once.
    return re.compile(rf"(?<!\w)(?:{'|'.join(starting)})|{'|'.join(inside)}", re.IGNORECASE)


_SIDE, _COLOUR = _pattern(_SIDES, _SIDES_ANYWHERE), _pattern(_COLOURS, _COLOURS_ANYWHERE)


def names_side(texts: Iterable[str]) -> bool:
    """Whether a text says left or right in any language, so that it would be wrong of the mirrored picture."""
    return any(_SIDE.search(_spelled(text)) for text in texts)


def names_colour(texts: Iterable[str]) -> bool:
    """Whether a text names a colour in any language, so that it would be wrong where hues are turned."""
    return any(_COLOUR.search(_spelled(text)) for text in texts)
