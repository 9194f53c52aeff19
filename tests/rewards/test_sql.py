"""SQL rewards: what a query may do, when results are equal, the partial rewards, and the packaged questions."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards import sqlite
from rlhf_cli.rewards.sql_execution import SqlExecution, orders
from rlhf_cli.rewards.sql_partial import SqlPartial, bigrams, items, jaccard, linked, xmlcount
from rlhf_cli.rewards.sqlite import Limits, query_of, run, same
from rlhf_cli.types import Sample

DATA = Path(sqlite.__file__).parents[1] / "data" / "sql"
SCRIPT = (
    "CREATE TABLE users (id INTEGER, name TEXT, age INTEGER, email TEXT); CREATE TABLE orders (id INTEGER, user_id INTEGER);"
    "INSERT INTO users VALUES (1,'ann',40,'a'),(2,'bob',20,'b'),(3,'cid',50,'c'),(4,'ann',60,'d');"
)
GOLD = "SELECT name FROM users AS u WHERE u.age > 30"
COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x < 300)"
LIMITS = Limits(1_000_000, 10.0, 100)


def execution(**settings):
    return SqlExecution(
        **{
            "compare": "set",
            "empty": "unequal",
            "folder": "packaged",
            "instructions": 1_000_000,
            "seconds": 10.0,
            "rows": 100,
        }
        | settings
    )


def partial(**settings):
    weights = {"execution": 3.0, "syntax": 1.0, "schema": 1.0, "ngram": 1.0, "format": 0.5}
    chosen = {
        "weights": weights,
        "linking": "jaccard",
        "tags": ["reasoning", "answer"],
        "folder": "packaged",
        "instructions": 1_000_000,
        "seconds": 10.0,
        "rows": 100,
    }
    return SqlPartial(**chosen | settings)


def scores(scorer, *responses, gold=GOLD, meta=None):
    samples = [Sample("p", r, (gold,), meta or {"script": SCRIPT}) for r in responses]
    return scorer(samples, torch.zeros(len(samples), dtype=torch.int64))


def values(scorer, *responses, **more):
    return scores(scorer, *responses, **more).value.tolist()


def test_results_decide_and_not_words():
    # Gold: ann, cid, ann. As a set the missing duplicate is invisible, as a multiset it is not.
    same_set = "SELECT DISTINCT name FROM users WHERE age >= 40"
    assert values(execution(), GOLD, same_set, "SELECT name FROM users", "SELEC", "") == [1, 1, 0, 0, 0]
    assert values(execution(compare="multiset"), GOLD, same_set) == [1, 0]


def test_order_counts_only_where_the_gold_query_orders():
    up, down = "SELECT id FROM users ORDER BY id", "SELECT id FROM users ORDER BY id DESC"
    assert values(execution(compare="ordered"), up, down, gold=up) == [1, 0]
    assert values(execution(compare="ordered"), down, gold="SELECT id FROM users") == [1]
    assert orders("SELECT a FROM t ORDER  BY a") and orders("SELECT 'x' FROM (SELECT 1) order by 1")
    assert not orders("SELECT a FROM (SELECT a FROM t ORDER BY a)") and not orders("SELECT 'order by' FROM t")


def test_two_empty_results_are_what_the_setting_says():
    none = "SELECT name FROM users WHERE age > 99"
    assert values(execution(), none, gold=none) == [0] and values(execution(empty="equal"), none, gold=none) == [1]
    got = scores(execution(empty="missing"), none, GOLD, gold=none)
    assert got.missing.tolist() == [True, False] and got.value[1] == 0


@pytest.mark.parametrize(
    "query, why",
    [
        ("DELETE FROM users", "not authorized"),
        ("INSERT INTO users VALUES (9,'x',1,'y')", "not authorized"),
        ("CREATE TABLE x (a)", "not authorized"),
        ("DROP TABLE users", "not authorized"),
        ("ATTACH DATABASE 'other.db' AS o", "not authorized"),
        ("PRAGMA query_only = 0", "not authorized"),
        ("SELECT * FROM pragma_table_info('users')", "not authorized|prohibited|no such table"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT random()", "not authorized"),
        ("VACUUM INTO 'x.db'", "authorization denied"),
        ("SELECT 1; DELETE FROM users", "one statement at a time"),
        ("SELECT length(zeroblob(100000000))", "too big"),
        (
            "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT max(x) FROM c",
            "over 1000000 instructions",
        ),
        ("SELECT a.id FROM users a, users b, users c, users d", "over 100 rows"),
        (f"{COUNT} SELECT x, {', '.join(['zeroblob(49000)'] * 20)} FROM c LIMIT 100", "^$"),
        (f"{COUNT} SELECT {', '.join(['zeroblob(49000)'] * 21)} FROM c LIMIT 100", "too large, over 100 MB"),
        (f"{COUNT} SELECT group_concat(hex(zeroblob(24000))) FROM c", "too big"),
        (f"SELECT 'x' LIKE '{'x' * 1001}'", "pattern too complex"),
        ("SELECT printf('%.*c', 2000000, 'x') || 1", "^$"),  # NULL
        (f"SELECT {', '.join(['1'] * 257)}", "too many columns"),
        ("SELECT 1" + "\0", "null character"),
        ("", "it is no query"),  # SQLite runs nothing without complaint
        ("-- SELECT 1", "it is no query"),
    ],
)
def test_what_a_query_may_not_do(query, why):
    import re

    connection = sqlite._made(SCRIPT)
    before = run(connection, "SELECT * FROM users", LIMITS)
    result = run(connection, query, LIMITS)
    assert re.search(why, result.error), result
    assert not result.late and run(connection, "SELECT * FROM users", LIMITS) == before


def test_what_sqlite_sorts_and_holds_is_limited_and_touches_no_disk():
    # In a process of its own: SQLite's limit of memory is one of the process, and is only ever lowered.
    code = (
        "from rlhf_cli.rewards import sqlite\nsqlite.HEAP = 1 << 23\nc, limits = sqlite._made('CREATE TABLE t (a)'), sqlite.Limits(10**6, 60.0, 10)\n"
        f"for q in ('{COUNT} SELECT hex(zeroblob(24000)) h FROM c ORDER BY h', 'SELECT ' + ', '.join(['hex(zeroblob(24000))'] * 240), 'SELECT 1'):\n"
        "    print(sqlite.run(c, q, limits))\n"
        "def of(size): return sqlite.connect({'script': f'CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob({size}))'}, '')\n"
        "print(of(20000000))\nkept = of(1)\n"
        f"for n in range(5): print(sqlite.run(of(1500000 + n), '{COUNT} SELECT length(max(h)) FROM (SELECT hex(zeroblob(24000)) h FROM c LIMIT 60) ORDER BY h', limits))\n"
        "for n in range(5): print(isinstance(of(2000000 + n), str))\n"
        "print(sqlite.run(kept, 'SELECT length(a) FROM t', limits))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    over = "takes over 8 MB of memory"
    assert said[:2] == [f"Result(rows=[], error='it {over}', late=True)"] * 2
    assert said[2] == "Result(rows=[(1,)], error='', late=False)"
    assert said[3] == f"its database {over}; name a file of SQLite in meta.database"
    # The databases of earlier records are closed where memory is short: five of 1.5 MB, then of 2 MB, fit one after the other.
    assert said[4:9] == ["Result(rows=[(48000,)], error='', late=False)"] * 5 and said[9:14] == ["False"] * 5
    assert said[14] == "Result(rows=[(1,)], error='', late=False)"


def test_no_instruction_works_for_long():
    def steps(query):  # looks at the limits, of which one stops a query
        return run(sqlite._made(SCRIPT), query, Limits(1_000_000, 5.0, 100))

    zeros, ones = "hex(zeroblob(24990))", "replace(hex(zeroblob(24990)),'0','1')"
    got = steps(
        f"SELECT length(trim({zeros}, substr({ones},9)||'0')), length(ltrim({zeros}, {ones})), rtrim({zeros}, '0')"
    )
    assert got == sqlite.Result([(0, 49980, "")])
    assert (
        steps("SELECT hex(zeroblob(30000))").error == "string or blob too big"
    )  # what instr and replace would work on


def test_trims_are_those_of_sqlite():
    plain, own = sqlite3.connect(":memory:"), sqlite._made(SCRIPT)
    values = ["'xaxbxx'", "''", "NULL", "11211", "1.50", "1e20", "x'7861780078'", "'é'||'xé'", "'x'||char(0)||'x'"]
    drops = ["'x'", "'xa'", "''", "NULL", "1", "0.5", "x'78'", "'é'", "char(0)||'x'", "'x'||char(0)"]
    for name in ("trim", "ltrim", "rtrim"):
        for value in values:
            query = f"SELECT {', '.join(f'{name}({value}, {d})' for d in drops)}, {name}({value})"
            assert run(own, query, LIMITS).rows == plain.execute(query).fetchall(), query


def test_a_table_may_be_wider_than_a_result():
    columns = ", ".join(f"c{i} INTEGER" for i in range(300))
    connection = sqlite._made(f"CREATE TABLE wide ({columns}); INSERT INTO wide (c299) VALUES (7)")
    assert run(connection, "SELECT c299 FROM wide", LIMITS).rows == [(7,)]


def test_the_clock_of_queries_stands_still():
    made = "CREATE TABLE t (a DEFAULT CURRENT_TIMESTAMP, b); INSERT INTO t (b) VALUES (date('now'))"
    connection = sqlite._made(made)
    assert run(connection, "SELECT a, b FROM t", LIMITS).rows == [("2025-01-01 00:00:00", "2025-01-01")]
    for query, value in {
        "CURRENT_DATE || CURRENT_TIME": "2025-01-0100:00:00",
        "date()": "2025-01-01",
        "datetime('NOW', 'localtime', '+1 day')": "2025-01-02 00:00:00",
        "julianday('now') - julianday('2024-12-31')": 1.0,
        "strftime('%Y') - strftime('%Y', '2000-05-05')": 25,
        "date('2024-02-29', '+1 year', 'utc')": "2025-03-01",
        "time('x')": None,
        "date('now' || char(0)) || date(x'6e6f77') || date(CAST('now' AS BLOB))": "2025-01-01" * 3,
        "date(x'4e4f57', x'6c6f63616c74696d65', '+1 day' || char(0) || 'x')": "2025-01-02",
        "strftime(x'2559' || char(0))": "2025",
        "strftime('%s', 'now')": "1735689600",  # seconds to 2025: 20,089 days
    }.items():
        assert run(connection, f"SELECT {query}", LIMITS).rows == [(value,)], query


def test_connections_serve_every_thread():
    from concurrent.futures import ThreadPoolExecutor

    connection = sqlite.connect({"script": SCRIPT}, "packaged")
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(
            lambda _: run(connection, "SELECT id FROM users WHERE date('now') > '2000'", LIMITS), range(50)
        )
    assert all(r.rows == [(1,), (2,), (3,), (4,)] for r in results)


def test_the_wall_clock_makes_a_score_missing_and_the_work_makes_it_zero():
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT max(x) FROM c"
    assert values(execution(), endless) == [0]
    got = scores(execution(instructions=10**12, seconds=0.05), endless)
    assert got.missing.tolist() == [True] and got.reasons == {0: "it takes over 0.05 s"}


def test_a_database_file_is_opened_read_only(tmp_path):
    file = tmp_path / "my data.sqlite"
    with sqlite3.connect(file) as made:
        made.executescript(SCRIPT)
    before = file.read_bytes()
    meta = {"database": file.name}
    assert values(execution(folder=str(tmp_path)), GOLD, "DELETE FROM users", meta=meta) == [1, 0]
    assert file.read_bytes() == before


def test_what_the_record_lacks_makes_a_score_missing(tmp_path):
    def reason(**meta):
        got = scores(execution(folder=str(tmp_path)), GOLD, gold=meta.pop("gold", GOLD), meta=meta or {"x": 1})
        assert got.missing.tolist() == [True]
        return got.reasons[0]

    assert reason().startswith("its record names no database: map dataset.columns.meta.database")
    assert reason(database="no.sqlite").startswith("there is no database ")
    assert reason(script="CREATE").startswith("the script of its database fails: ")
    assert reason(script=SCRIPT, gold="SELECT nix FROM users") == "its gold query fails: no such column: nix"


def test_the_query_is_the_last_fence_or_answer():
    assert query_of("a ```sql\nSELECT 1;\n``` b ```SQL\nSELECT 2\n``` c") == "SELECT 2"
    assert query_of("<answer>SELECT 1</answer> x <answer>\nSELECT 3;\n</answer>") == "SELECT 3"
    assert query_of(" SELECT 4; ") == "SELECT 4"
    assert same([(1, "a"), (1, "a")], [(1, "a")], "set") and same([(1,)], [(1.0,)], "ordered")


def test_schema_linking_by_hand():
    assert items(GOLD) == {"users", "name", "age"}
    bare = "SELECT name FROM users WHERE age > 30"  # without the alias: the same items, the same bigrams
    assert linked(GOLD, bare, "jaccard") == linked(GOLD, bare, "recall") == jaccard(bigrams(GOLD), bigrams(bare)) == 1
    # {id, users} shares users: of four together, and of the gold's three.
    assert linked(GOLD, "SELECT id FROM users", "jaccard") == 1 / 4 and linked(
        GOLD, "SELECT id FROM users", "recall"
    ) == pytest.approx(1 / 3)
    # Naming everything maximises recall, not Jaccard: three of six.
    everything = "SELECT name, age, id, email FROM users, orders"
    assert linked(GOLD, everything, "recall") == 1 and linked(GOLD, everything, "jaccard") == 0.5
    assert linked(GOLD, "SELECT FROM WHERE", "recall") == 0


def test_bigrams_by_hand():
    # select name / name from / from users / users where / where age / age 30: without the alias the same.
    assert bigrams(GOLD) == bigrams("select NAME from Users where age > 30") and len(bigrams(GOLD)) == 6
    # select id / id from / from users: one shared of 3 + 6 - 1.
    assert jaccard(bigrams(GOLD), bigrams("SELECT id FROM users")) == 1 / 8


def test_xmlcount_by_hand():
    good = "<reasoning>\na\n</reasoning>\n<answer>\nSELECT 1\n</answer>"
    assert (
        xmlcount(good, ("reasoning", "answer"))
        == 0.5
        == xmlcount(good.replace("a\n", "a" * 3000 + "\n", 1), ("reasoning", "answer"))
    )
    # " more" and a newline follow the tag: the third tag line no longer stands, its whole text of 61 is subtracted.
    assert xmlcount("x" * 3000, ("reasoning", "answer")) == 0
    assert xmlcount("<reasoning>\na\n</reasoning>\n", ("reasoning", "answer")) == 0.25
    # 20 characters and a newline after the closing line: 0.5 - 2 * 0.001 * 20, plus one spare character.
    assert xmlcount(good + "\n" + "y" * 20, ("reasoning", "answer")) == pytest.approx(0.5 - 0.021 - 0.021)


def test_partial_rewards_of_right_and_wrong_queries():
    tagged = "<reasoning>\nx\n</reasoning>\n<answer>\n{}\n</answer>"
    got = scores(partial(), GOLD, tagged.format(GOLD), "SELECT id FROM users", "hello", "SELECT name FROM nowhere", "")
    # Right: 3 + 1 + 1 + 1, and 0.5 for the tags. SELECT id: it runs, schema 1/4, n-grams 1/8. A wrong table: schema
    # {name, nowhere} against {users, name, age} is 1/4, n-grams (select name, name from) 2 of 3 + 6 - 2.
    assert got.value.tolist() == pytest.approx([6, 6.5, 1 + 1 / 4 + 1 / 8, 0, 1 / 4 + 2 / 7, 0])
    assert set(got.components) == {"execution", "syntax", "schema", "ngram", "format"}
    weights = {"execution": 3.0, "syntax": 1.0, "schema": 1.0, "ngram": 1.0, "format": 0.5}
    total = sum(w * got.components[k] for k, w in weights.items())
    assert torch.allclose(total, got.value)


def test_partial_terms_keep_the_order_where_execution_is_flat():
    from rlhf_cli.credit import group_norm

    # Four wrong queries, ever nearer to the gold one: execution alone gives no signal.
    tries = ["nothing", "SELECT id FROM users", "SELECT name FROM users", "SELECT name FROM users WHERE age < 30"]
    got = scores(partial(), *tries)
    group, mask = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
    settings = {"scale": "std", "ddof": 1, "eps": 1e-4}
    flat = group_norm(got.components["execution"], mask, group, **settings).advantage
    dense = group_norm(got.value, mask, group, **settings).advantage
    assert flat.abs().max() == 0 and dense.flatten().argsort().tolist() == [0, 1, 2, 3]


def test_execution_alone_is_grpo_on_accuracy_and_one_partial_term_gives_order():
    from rlhf_cli.combine import weighted_sum
    from rlhf_cli.credit import group_norm

    group, mask = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)

    def advantage(score):
        return group_norm(score, mask, group, scale="std", ddof=1, eps=0.0).advantage.flatten()

    tries = [GOLD, "SELECT id FROM users", "nothing", GOLD.lower()]
    only = {"execution": 3.0, "syntax": 0.0, "schema": 0.0, "ngram": 0.0, "format": 0.0}
    accuracy = advantage(scores(execution(), *tries).value)
    assert torch.allclose(advantage(scores(partial(weights=only), *tries).value), accuracy) and accuracy.any()
    # all fail, n-grams 0.1 0.4 0.2 0.4 and the rest equal: mean 0.275, deviations -.175 .125 -.075 .125, std 0.15
    terms = torch.tensor([[0, 1, 0.5, x] for x in (0.1, 0.4, 0.2, 0.4)], dtype=torch.float64)
    dense = advantage(weighted_sum(terms, torch.tensor([3.0, 1, 1, 1], dtype=torch.float64)))
    assert dense.tolist() == pytest.approx([-7 / 6, 5 / 6, -0.5, 5 / 6])
    assert not advantage(weighted_sum(terms, torch.tensor([3.0, 0, 0, 0], dtype=torch.float64))).any()


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(
        ConfigError, match=r"^reward\.sql_execution: instructions=10, seconds=10\.0, rows=100 are not allowed"
    ):
        execution(instructions=10)
    with pytest.raises(
        ConfigError,
        match=r"^reward\.sql_partial: weights=\{'execution': 1\.0\}, .* weights are those of execution, syntax",
    ):
        partial(weights={"execution": 1.0})


RECORDS = [
    json.loads(line) | {"part": p}
    for p in ("train", "heldout")
    for line in (DATA / f"{p}.jsonl").read_text().splitlines()
]


def test_packaged_questions_are_answered_by_their_gold_queries():
    assert [sum(r["part"] == p for r in RECORDS) for p in ("train", "heldout")] == [48, 16]
    assert len({r["question"] for r in RECORDS}) == 64
    for r in RECORDS:
        connection = sqlite.connect({"database": r["database"]}, "packaged")
        result = run(connection, r["gold"], LIMITS)
        assert result.rows and not result.error and result.rows != [(None,)], r
        assert items(r["gold"]) and r["schema"] in (DATA / r["database"]).read_text()


def test_packaged_questions_are_not_solved_by_another_ones_query():
    """Of each database, a query answers its own question alone, even as a set of rows."""
    for database in {r["database"] for r in RECORDS}:
        own = [r["gold"] for r in RECORDS if r["database"] == database]
        connection = sqlite.connect({"database": database}, "packaged")
        results = [frozenset(run(connection, q, LIMITS).rows) for q in own]
        assert len(set(results)) == len(own), [q for q, x in zip(own, results, strict=True) if results.count(x) > 1]


def test_the_packaged_dataset_fits_its_rewards():
    from rlhf_cli.compose import compose
    from rlhf_cli.data.loading import load
    from rlhf_cli.sources.assemble import sample_of

    cfg = compose("train", ["dataset=sql", "reward=[sql_execution,sql_partial]"], None)
    records = load(cfg.dataset, "heldout")
    assert max(len(r.prompt) for r in records) < 1500
    samples = [sample_of(r, r.references[0]) for r in records]
    group = torch.arange(len(samples))
    assert execution()(samples, group).value.tolist() == [1] * 16 and (partial()(samples, group).value == 6).all()
