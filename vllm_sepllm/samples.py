# ruff: noqa: E501, RUF001
"""Short texts of several scripts and kinds, to estimate what separators keep.

They were written for this purpose. Each has the density of punctuation that is usual for its kind,
and several hundred characters, so that its share of separators is a few per cent exact.
"""

from __future__ import annotations

ENGLISH = """\
The ferry was late again, and the old man who sold tickets had stopped pretending to care. \
"It will come," he said, "or it will not come." He folded his newspaper, laid it on the sill, \
and looked out over the grey water.

Nobody answered him. A woman with two children moved closer to the stove; the younger child, \
half asleep, held a paper boat against her coat. What would they do if the weather turned? \
There was no inn on this side of the river, no house with a light, nothing but reeds and mud \
and the long road back to town.

At last a whistle sounded, thin and far away. The children ran to the window. "There!" cried \
the boy. "I saw it first!" And so he had: a yellow spark, rising and falling, drew slowly nearer \
through the rain. The ticket seller sighed, put on his cap, and went out to catch the rope.
"""
CHINESE = """\
渡船又晚了，卖票的老人早已不再着急。他说：“总会来的，也可能不来。”他折好报纸，放在窗台上，望着灰色的江水，\
一句话也不说。屋里有三个人：一位妇女，两个孩子。小的那个快睡着了，手里还拿着一只纸船。

天要是变了，怎么办呢？河这边没有旅店，没有灯光，只有芦苇、泥地和一条通向城里的长路。妇女走近火炉，给孩子盖好衣服，\
轻轻叹了一口气；外面的雨越下越大，风把门吹得直响。

终于，远处传来一声汽笛，又细又长。孩子们跑到窗前，男孩喊道：“看，在那里！我先看见的！”果然，一点黄色的光在雨中起伏，\
慢慢地靠近。老人戴上帽子，拿起绳子，出门去了。
"""
JAPANESE = """\
渡し船はまた遅れていた。切符を売る老人は、もう気にするふりもしない。「来るさ。来ないかもしれないがね」と言って、\
新聞をたたみ、窓辺に置き、灰色の川を眺めた。

誰も答えなかった。二人の子どもを連れた女が、ストーブのそばへ寄った。下の子は半分眠りながら、紙の船を胸に抱いている。\
天気が変わったら、どうすればいいのだろう？こちら岸には宿もなく、明かりのある家もなく、葦と泥と、町へ戻る長い道があるだけだ。

やがて、遠くで細い汽笛が鳴った。子どもたちは窓へ走った。「ほら、あそこ！」と男の子が叫んだ。「ぼくが先に見つけた！」\
黄色い光が、雨の中を上下しながら、ゆっくりと近づいてくる。老人はため息をつき、帽子をかぶり、綱を取りに外へ出た。
"""
KOREAN = """\
나룻배는 또 늦었고, 표를 파는 노인은 이제 걱정하는 척도 하지 않았다. "오겠지. 안 올 수도 있고." 그는 신문을 접어 \
창턱에 놓고, 잿빛 강물을 바라보았다.

아무도 대답하지 않았다. 두 아이를 데리고 온 여자가 난로 쪽으로 다가앉았다. 작은아이는 반쯤 잠든 채, 종이배를 품에 \
안고 있었다. 날씨가 나빠지면 어떻게 하지? 강 이쪽에는 여관도, 불 켜진 집도 없었다. 갈대와 진흙, 그리고 마을로 \
돌아가는 먼 길뿐이었다.

마침내 멀리서 가느다란 기적 소리가 들렸다. 아이들은 창가로 달려갔다. "저기!" 사내아이가 외쳤다. "내가 먼저 봤어!" \
정말로 노란 불빛 하나가, 빗속에서 오르내리며, 천천히 다가오고 있었다. 노인은 모자를 쓰고, 밧줄을 잡으러 나갔다.
"""
RUSSIAN = """\
Паром опять опаздывал, и старик, продававший билеты, уже не делал вида, что это его волнует. \
«Придёт, — сказал он, — а может, и не придёт». Он сложил газету, положил её на подоконник и стал \
смотреть на серую воду.

Никто ему не ответил. Женщина с двумя детьми подвинулась ближе к печке; младший ребёнок, почти \
уснувший, прижимал к себе бумажный кораблик. Что делать, если погода испортится? На этом берегу не \
было ни гостиницы, ни дома с огнём: только камыш, грязь и длинная дорога в город.

Наконец вдали раздался тонкий гудок. Дети бросились к окну. «Вон там! — закричал мальчик. — Я первый \
увидел!» И правда: жёлтый огонёк, то поднимаясь, то опускаясь, медленно приближался сквозь дождь. \
Старик вздохнул, надел шапку и пошёл ловить канат.
"""
ARABIC = """\
تأخرت العبّارة مرة أخرى، ولم يعد الشيخ الذي يبيع التذاكر يتظاهر بالقلق. قال: «ستأتي، أو لا تأتي». \
ثم طوى جريدته، ووضعها على حافة النافذة، ونظر إلى الماء الرمادي.

لم يجبه أحد. اقتربت امرأة مع طفلين من المدفأة؛ وكان الصغير، وهو نصف نائم، يضم إلى صدره قاربا من ورق. \
ماذا يفعلون لو ساء الجو؟ لم يكن على هذه الضفة نزل، ولا بيت فيه ضوء، ولا شيء غير القصب والطين، \
والطريق الطويل إلى المدينة.

أخيرا سُمعت صافرة رفيعة من بعيد. ركض الطفلان إلى النافذة. صاح الولد: «هناك! أنا رأيتها أولا!» \
وكان على حق: نقطة صفراء، تعلو وتهبط، تقترب ببطء تحت المطر. تنهد الشيخ، ولبس قبعته، وخرج ليمسك الحبل.
"""
HINDI = """\
नाव फिर देर से आ रही थी, और टिकट बेचने वाला बूढ़ा अब चिंता का दिखावा भी नहीं करता था। उसने कहा, "आएगी, \
या नहीं आएगी।" उसने अख़बार मोड़ा, खिड़की पर रखा, और धुंधले पानी को देखने लगा।

किसी ने जवाब नहीं दिया। दो बच्चों वाली एक औरत चूल्हे के पास खिसक आई। छोटा बच्चा आधी नींद में था, और काग़ज़ की \
नाव सीने से लगाए था। अगर मौसम बिगड़ गया तो क्या होगा? नदी के इस ओर न सराय थी, न रोशनी वाला घर; बस सरकंडे, \
कीचड़ और शहर की लंबी सड़क।

आख़िर दूर से एक पतली सीटी सुनाई दी। बच्चे खिड़की की ओर दौड़े। "वहाँ!" लड़का चिल्लाया। "मैंने पहले देखा!" सचमुच, \
बारिश में एक पीली रोशनी ऊपर-नीचे होती हुई धीरे-धीरे पास आ रही थी। बूढ़े ने टोपी पहनी, और रस्सी पकड़ने बाहर गया।
"""
THAI = """\
เรือข้ามฟากมาช้าอีกแล้ว และชายชราที่ขายตั๋วก็เลิกทำท่ากังวล เขาพูดว่า "เดี๋ยวก็มา หรือไม่ก็ไม่มา" \
แล้วพับหนังสือพิมพ์ วางไว้ที่ขอบหน้าต่าง และมองออกไปที่แม่น้ำสีเทา

ไม่มีใครตอบ หญิงคนหนึ่งกับเด็กสองคนขยับเข้าไปใกล้เตาไฟ เด็กคนเล็กใกล้จะหลับ มือยังถือเรือกระดาษไว้ \
ถ้าอากาศเปลี่ยนจะทำอย่างไร ฝั่งนี้ไม่มีโรงแรม ไม่มีบ้านที่เปิดไฟ มีแต่ต้นอ้อ โคลน และถนนยาวกลับเข้าเมือง

ในที่สุดก็มีเสียงหวูดดังมาแต่ไกล เด็กๆ วิ่งไปที่หน้าต่าง "นั่นไง" เด็กชายร้อง "ผมเห็นก่อน" จริงด้วย \
แสงสีเหลืองดวงหนึ่ง ขึ้นๆ ลงๆ ท่ามกลางสายฝน ค่อยๆ ใกล้เข้ามา ชายชราสวมหมวก แล้วออกไปรับเชือก
"""
CODE = '''\
from dataclasses import dataclass, field


@dataclass
class Ferry:
    """A boat that carries passengers over a river."""

    name: str
    capacity: int = 12
    passengers: list[str] = field(default_factory=list)

    def board(self, person: str, luggage: int = 0) -> bool:
        if len(self.passengers) >= self.capacity:
            return False
        self.passengers.append(person)
        print(f"{person} boards {self.name} with {luggage} bags")
        return True


def cross(ferry: Ferry, people: dict[str, int]) -> int:
    total = 0
    for person, bags in sorted(people.items()):
        if not ferry.board(person, luggage=bags):
            break  # the others wait
        total += 1
    return total


if __name__ == "__main__":
    boat = Ferry("Heron", capacity=2)
    print(cross(boat, {"Ada": 1, "Ben": 0, "Cleo": 3}))
'''
JSON = """\
{
  "ferry": {"name": "Heron", "capacity": 12, "open": true, "position": [52.51, 13.38]},
  "stops": [
    {"id": 1, "name": "Mill", "departures": ["06:40", "08:10", "17:35"], "shelter": null},
    {"id": 2, "name": "Reed Bank", "departures": ["07:05", "08:45", "18:00"], "shelter": false}
  ],
  "fares": {"adult": 2.5, "child": 1.2, "bicycle": 0.8, "currency": "EUR"},
  "notes": "No service in fog; ask at the ticket office."
}
"""
# By the name that start-up shows.
SAMPLES = {
    "English": ENGLISH,
    "Chinese": CHINESE,
    "Japanese": JAPANESE,
    "Korean": KOREAN,
    "Russian": RUSSIAN,
    "Arabic": ARABIC,
    "Hindi": HINDI,
    "Thai": THAI,
    "code": CODE,
    "JSON": JSON,
}
