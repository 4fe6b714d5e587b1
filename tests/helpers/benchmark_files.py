"""Small copies of the files that benchmarks are distributed in, with tiny images and videos."""

import base64
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(kind: str = "JPEG", size: tuple[int, int] = (32, 24), color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pixels("PNG" if file.suffix == ".png" else "JPEG"))


def write_json(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def write_lines(file: Path, *rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_table(file: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: list[dict]) -> Path:
    """Columns with bytes are images, as the library datasets stores them."""

    def stored(value):
        if isinstance(value, list):
            return [stored(each) for each in value]
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    table = pa.Table.from_pylist([{name: stored(value) for name, value in row.items()} for row in rows])
    pq.write_table(table, file)
    return file


def textvqa(root: Path) -> None:
    record = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck", "Camera"],
        "flickr_original_url": "https://farm1.staticflickr.com/a_o.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", *["dakota"] * 7, "clos culombu", "dakota digital"],
        "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
        "question_id": 34602,
        "set_name": "val",
    }
    other = record | {"question_id": 34603, "question": "what does the small white text spell?"}
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(root / "TextVQA_0.5.1_val.json", head | {"data": [record, other]})
    picture(root / "train_images" / "003a8ae2ef43b901.jpg")


def docvqa(root: Path) -> None:
    record = {
        "questionId": 49153,
        "question": "What is the ‘actual’ value per 1000, during the year 1975?",
        "question_types": ["figure/diagram", "table/list"],
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["0.28"],
        "data_split": "val",
    }
    other = record | {"questionId": 24580, "answers": ["university of california", "University of California"]}
    head = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "dataset_version": "1.0"}
    write_json(root / "val_v1.0_withQT.json", head | {"data": [record, other]})
    picture(root / "documents" / "pybv0228_81.png")


def chartqa(root: Path) -> None:
    asked = {"imgname": "41699051005347.png", "query": "How many food item is shown in the bar graph?", "label": "14"}
    write_json(root / "test_human.json", [asked])
    write_json(root / "test_augmented.json", [asked | {"query": "What was the value in 2019?", "label": "0.57"}])
    picture(root / "png" / "41699051005347.png")


def gqa(root: Path) -> None:
    record = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": [],
        "equivalent": ["201307251"],
        "question": "Is it overcast?",
        "imageId": "n161313",
        "isBalanced": True,
        "groups": {"global": None, "local": "13-weather_overcast"},
        "answer": "no",
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear.",
    }
    other = record | {"question": "Who is wearing the dress?", "answer": "woman"}
    write_json(root / "testdev_balanced_questions.json", {"201307251": record, "201640614": other})
    picture(root / "images" / "n161313.jpg")


def pope(root: Path) -> None:
    image = {"image": "COCO_val2014_000000548882.jpg", "image_id": 548882}
    yes = {"question_id": 0, **image, "text": "Is there a dining table in the image?", "label": "yes"}
    no = {"question_id": 3, **image, "text": "Is there a tv in the image?", "label": "no"}
    write_lines(root / "coco_pope_random.json", yes, no)
    write_lines(root / "coco_pope_popular.json", yes, no | {"text": "Is there a person in the image?"})
    picture(root / "val2014" / "COCO_val2014_000000548882.jpg")


def scienceqa(root: Path) -> None:
    problem = {
        "question": "Which of the following could Gordon's test show?",
        "choices": ["if the spacecraft was damaged", "how steady a parachute was"],
        "answer": 1,
        "hint": "People can use the engineering-design process.\nGordon was an aerospace engineer.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade8",
        "subject": "natural science",
        "topic": "science-and-engineering-practices",
        "split": "test",
    }
    problems = {
        "4": problem,
        "5": problem | {"image": None},
        "8": problem | {"hint": "", "answer": 0},
        "9": problem | {"split": "train"},
    }
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", {"train": ["9"], "val": [], "test": ["4", "5", "8"]})
    for number in "48":
        picture(root / "test" / number / "image.png")


def mmbench(root: Path) -> None:
    image = base64.b64encode(pixels()).decode()
    row = {
        "index": "241",
        "question": "Which of the following could Gordon's test show?",
        "hint": "The passage below describes an experiment.\nRead it, and answer.",
        "A": 'if the "spacecraft" was damaged',
        "B": "how steady it was",
        "C": "",
        "D": "",
        "answer": "B",
        "category": "identity_reasoning",
        "image": image,
        "source": "scienceqa",
        "l2-category": "attribute_reasoning",
        "comment": "",
        "split": "dev",
    }
    four = {"index": "252", "question": "What is it?", "hint": "", "C": "a dog", "D": "a cat", "answer": "D"}
    again = {"index": "1000241", "image": "241", "A": row["B"], "B": row["A"], "answer": "A"}  # as VLMEvalKit's files
    write_table(root / "mmbench_dev_20230712.tsv", [row, row | four, row | again], "\t")


def seed(root: Path) -> None:
    record = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = record | {"data_type": "video", "question_id": "v102223", "data_id": "105243.webm", "question_type_id": 10}
    kinds = {"Instances Counting": 5, "Action Recognition": 10}
    write_json(root / "SEED-Bench.json", {"question_type": kinds, "questions": [record, video]})
    (root / "SEED-Bench-image").mkdir()
    (root / "SEED-Bench-image" / "1454426_2591111986").write_bytes(pixels())


def mme(root: Path) -> None:
    hint = "Please answer yes or no."
    flat, nested = root / "code_reasoning", root / "artwork" / "questions_answers_YN"
    flat.mkdir()
    (flat / "0020.txt").write_text(f'Is the output "hi"? {hint}\tYes\nIs the output "ho"? {hint}\tNo\n')
    picture(flat / "0020.png")
    nested.mkdir(parents=True)
    (nested / "14777.txt").write_text(f"Is this artwork from 1520? {hint}\tYes\nFrom 1777? {hint}\tNo")
    picture(root / "artwork" / "images" / "14777.jpg")


def refcoco(root: Path) -> None:
    image = "data/coco/train2014/COCO_train2014_000000519404.jpg"
    row = {
        "image": image,
        "sent": "two woman one in black",
        "bbox": [20.0, 12.0, 60.0, 52.0],
        "height": 60,
        "width": 80,
    }
    tall = row | {"sent": "cat", "bbox": [0, 1, 30, 61], "height": 61, "width": 30}
    write_lines(root / "refcoco_val.jsonl", row, tall)
    picture(root / "train2014" / "COCO_train2014_000000519404.jpg")


def activitynet_qa(root: Path) -> None:
    asked = {
        "video_name": "1QIUV7WYKXg",
        "question": "is the athlete wearing trousers",
        "question_id": "v_1QIUV7WYKXg_3",
    }
    other = {"video_name": "9eniCub7u60", "question": "what color is the car", "question_id": "v_9eniCub7u60_2"}
    write_json(root / "test_q.json", [asked, other])
    color = {"answer": "black", "type": 4, "question_id": "v_9eniCub7u60_2"}
    write_json(root / "test_a.json", [color, {"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}])
    (root / "v_1QIUV7WYKXg.mp4").touch()
    (root / "v_9eniCub7u60.mkv").touch()


def msvd_qa(root: Path) -> None:
    asked = {"answer": "cook", "id": 37389, "question": "who is measuring ingredients?", "video_id": 1301}
    write_json(root / "test_qa.json", [asked, {**asked, "id": 37390, "question": "what is a man doing?"}])
    (root / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\nyREFLy3_f9s_20_30 vid1301\n")
    (root / "YouTubeClips").mkdir()
    (root / "YouTubeClips" / "yREFLy3_f9s_20_30.avi").touch()


def nextqa(root: Path) -> None:
    (root / "test.csv").write_text(
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        "4010069381,369,640,480,how do the two man play the instrument,0,6,CH,"
        "roll the handle,tap their feet,strum the string,hit with sticks,pat with hand\n"
        '4010069381,369,640,480,"why, then",2,1,CW,share,approach,unwrap it,playing,gesture something\n'
    )
    write_json(root / "map_vid_vidorID.json", {"4010069381": "1164/4010069381", "4882821564": "0010/4882821564"})
    (root / "NExTVideo" / "1164").mkdir(parents=True)
    (root / "NExTVideo" / "1164" / "4010069381.mp4").touch()


def egoschema(root: Path) -> None:
    options = {f"option {number}": f"C does {what}." for number, what in enumerate(["this", "that", "it", "so", "no"])}
    ids = ["001934bb-81bd-4cd8-a574-0472ef3f6678", "0074f737-11cb-497d-8d07-77c3a8127391"]
    asked = {"google_drive_id": "15yGB0TI5zG5usdQZOXn0CrRzkJNB0gMl", "question": "What does C do?", **options}
    write_json(root / "questions.json", [{"q_uid": name, **asked} for name in ids])
    write_json(root / "subset_answers.json", {ids[1]: 3})
    (root / "videos").mkdir()
    for name in ids:
        (root / "videos" / f"{name}.mp4").touch()


egoschema_full = egoschema


def easy_vqa(root: Path) -> None:
    write_json(root / "questions.json", [["what is the red shape?", "triangle", 0], ["is there a circle?", "no", 1]])
    for number in 0, 1:
        picture(root / "images" / f"{number}.png")
