//! Small histories with a known answer: what is linearizable though it may not look so, and one violation of each kind,
//! with the operations that it is found in.

use crate::history::{Call, History, Operation, Outcome, Violation, http};
use crate::{delete, get, operation, put};

fn history(operations: &[Operation]) -> History {
    let mut history = History::new();
    operations.iter().for_each(|operation| history.push(operation.clone()));
    history
}

#[track_caller]
fn is_good(operations: &[Operation]) {
    if let Err(violation) = history(operations).check() {
        panic!("{violation}");
    }
}

/// Which of `operations` are found to contradict each other.
#[track_caller]
fn contradict(operations: &[Operation]) -> Vec<usize> {
    let violation = history(operations).check().expect_err("a planted violation");
    assert!(!violation.gave_up(), "{violation}");
    let found = violation.contradict();
    assert!(found.iter().all(|one| operations.contains(one)));
    (0..operations.len()).filter(|at| found.contains(&operations[*at])).collect()
}

#[test]
fn nothing_happened() {
    is_good(&[]);
    is_good(&[get(1, "", 0, 1), get(2, "", 0, 1)]);
}

#[test]
fn concurrent_operations_have_any_order() {
    // Two writes at once, then either is there for good.
    is_good(&[put(1, "a", 0, 10), put(2, "b", 0, 10), get(3, "a", 20, 30), get(3, "a", 40, 50)]);
    is_good(&[put(1, "a", 0, 10), put(2, "b", 0, 10), get(3, "b", 20, 30), get(3, "b", 40, 50)]);
    // A write happens before its answer, and the next read at another may still be before it.
    is_good(&[put(1, "a", 0, 100), get(2, "", 10, 20), get(3, "a", 30, 40), get(2, "a", 50, 60)]);
    // Three writes seen one after the other, in an order that is not that of their calls.
    is_good(&[
        put(1, "a", 0, 100),
        put(2, "b", 1, 100),
        put(3, "c", 2, 100),
        get(4, "c", 10, 20),
        get(4, "a", 30, 40),
        get(4, "b", 50, 60),
    ]);
}

/// The clock may be too coarse to tell which was first.
#[test]
fn an_answer_and_a_call_at_one_time_are_concurrent() {
    is_good(&[put(1, "a", 0, 10), get(2, "", 10, 20)]);
    assert_eq!(contradict(&[put(1, "a", 0, 10), get(2, "", 11, 20)]), [0, 1]);
}

#[test]
fn an_unknown_write_happens_any_time_later_or_never() {
    let unknown = operation(1, Call::Put("u".into()), 0, Outcome::Unknown);
    let put_b = put(2, "b", 10, 20);
    is_good(&[unknown.clone(), put_b.clone(), get(3, "b", 30, 40), get(3, "b", 50, 60)]);
    is_good(&[unknown.clone(), put_b.clone(), get(3, "b", 30, 40), get(3, "u", 50, 60)]);
    is_good(&[unknown.clone(), put_b.clone(), get(3, "u", 30, 40), get(3, "u", 50, 60)]);
    // But once at most, and not before it was called.
    assert_eq!(
        contradict(&[unknown.clone(), put_b, get(3, "u", 12, 14), get(3, "b", 30, 40), get(3, "u", 50, 60)]).len(),
        3
    );
    let late = operation(1, Call::Put("u".into()), 100, Outcome::Unknown);
    assert_eq!(contradict(&[get(3, "u", 50, 60), late]), [0]);
    // An absence may be an unknown deletion's work; the second absence is, too, or another's.
    let unknown = operation(4, Call::Delete, 0, Outcome::Unknown);
    let came_back = [put(1, "a", 1, 2), get(1, "", 3, 4), put(1, "b", 5, 6), get(1, "", 7, 8)];
    is_good(&[&[unknown.clone(), unknown.clone()], &came_back[..]].concat());
    assert!(!contradict(&[&[unknown], &came_back[..]].concat()).is_empty());
}

#[test]
fn reads_without_an_answer_say_nothing() {
    is_good(&[put(1, "a", 0, 1), operation(2, Call::Get, 2, Outcome::Unknown), get(2, "a", 3, 4)]);
}

#[test]
fn keys_are_independent() {
    let mut other = put(1, "x", 0, 1);
    other.key = b"other".to_vec();
    is_good(&[other, get(1, "", 2, 3)]);
}

#[test]
fn a_stale_read() {
    let operations = [put(1, "a", 0, 10), put(1, "b", 20, 30), get(2, "a", 40, 50), get(2, "b", 60, 70)];
    assert_eq!(contradict(&operations), [0, 1, 2]);
}

#[test]
fn a_lost_acknowledged_write() {
    assert_eq!(contradict(&[put(1, "a", 0, 10), get(2, "", 20, 30), get(2, "", 40, 50)]).len(), 2);
}

#[test]
fn a_write_lost_later() {
    let operations = [put(1, "a", 0, 10), get(2, "a", 20, 30), get(2, "", 40, 50)];
    assert_eq!(contradict(&operations).len(), 2);
}

#[test]
fn a_read_of_a_write_that_was_not_applied() {
    let refused = operation(1, Call::Put("x".into()), 0, Outcome::NotApplied);
    let operations = [refused, put(2, "b", 5, 10), get(3, "x", 20, 30), get(3, "b", 40, 50)];
    assert_eq!(contradict(&operations), [2]);
    let text = history(&operations).check().unwrap_err().to_string();
    assert!(
        text.contains("read x, which only a write left behind that was answered as not applied: client 1"),
        "{text}"
    );
    // Where another wrote the same and was acknowledged, it is that one's.
    is_good(&[operations[0].clone(), put(2, "x", 5, 10), get(3, "x", 20, 30)]);
}

#[test]
fn a_read_of_what_nobody_wrote() {
    let operations = [put(1, "a", 0, 10), get(2, "z", 5, 30)];
    assert_eq!(contradict(&operations), [1]);
    assert!(history(&operations).check().unwrap_err().to_string().contains("read z, which nobody wrote"));
}

#[test]
fn a_read_from_the_future() {
    let operations = [get(2, "a", 0, 10), put(1, "a", 20, 30)];
    assert_eq!(contradict(&operations), [0]);
    assert!(history(&operations).check().unwrap_err().to_string().contains("before anybody had called a write of it"));
}

#[test]
fn two_readers_see_two_writes_in_opposite_orders() {
    let operations = [
        put(1, "a", 0, 100),
        put(2, "b", 0, 100),
        get(3, "a", 10, 20),
        get(3, "b", 30, 40),
        get(4, "b", 10, 20),
        get(4, "a", 30, 40),
    ];
    // Either write may be taken for the one that happens again: it is enough that one of them cannot.
    let found = contradict(&operations);
    assert_eq!(found.iter().filter(|at| **at >= 2).count(), 4, "all four reads: {found:?}");
}

#[test]
fn a_value_comes_back() {
    let operations =
        [put(1, "a", 0, 100), put(2, "b", 0, 100), get(3, "a", 1, 2), get(3, "b", 3, 4), get(3, "a", 5, 6)];
    assert_eq!(contradict(&operations), [2, 3, 4]);
}

#[test]
fn a_write_that_is_applied_twice() {
    let operations = [
        put(1, "a", 0, 10),
        get(3, "a", 12, 14),
        put(2, "b", 20, 30),
        get(3, "b", 40, 50),
        get(3, "a", 60, 70),
        put(1, "c", 80, 90),
        get(3, "c", 100, 110),
    ];
    let found = contradict(&operations);
    assert!(found.len() == 3 && found.contains(&4), "{found:?}");
}

#[test]
fn a_lost_delete() {
    let operations = [put(1, "a", 0, 10), delete(1, 20, 30), get(2, "a", 40, 50)];
    assert_eq!(contradict(&operations), [0, 1, 2]);
    is_good(&[put(1, "a", 0, 10), delete(1, 20, 30), get(2, "", 40, 50), put(1, "b", 60, 70), get(2, "b", 80, 90)]);
}

/// A violation on one key is told though another key was too hard; and if there is none, that nothing is known.
#[test]
fn too_hard_is_neither_good_nor_bad() {
    let mut history = history(&[put(1, "a", 0, 10), get(2, "a", 20, 30)]);
    let gave_up = history.check_within(2).unwrap_err();
    assert!(gave_up.gave_up() && gave_up.contradict().is_empty());
    assert!(gave_up.to_string().contains("gave up"), "{gave_up}");
    assert!(history.check_within(10).is_ok());
    let mut stuck = get(1, "z", 0, 1);
    stuck.key = b"later".to_vec();
    history.push(stuck);
    assert!(matches!(history.check_within(2), Err(Violation::NotLinearizable(_))));
}

#[test]
fn a_violation_is_told_and_drawn() {
    let operations = [
        put(1, "a", 0, 10),
        put(2, "b", 20, 30),
        operation(4, Call::Put("c".into()), 25, Outcome::Unknown),
        operation(5, Call::Put("d".into()), 26, Outcome::NotApplied),
        get(3, "a", 40, 50),
        get(1, "b", 45, 60),
    ];
    let violation = history(&operations).check().unwrap_err();
    let expected = "\
key key: not linearizable (3 of 6 operations were ordered)
No order has all of these:
  client 1  put a  0..10
  client 2  put b  20..30
  client 3  get = a  40..50
The longest order of them and the writes that they saw:
  client 1  put a  0..10
  client 2  put b  20..30
and nowhere in it:
  client 3  get = a  40..50
";
    let text = violation.to_string();
    assert!(text.starts_with(expected), "\n{text}");
    let drawing = "
* client 1  put a    |=====|
* client 2  put b                |=================|
  client 4  put c                      |.........................................>
  client 5  put d                            |...................................x
* client 3  get = a                                      |===========|
  client 1  get = b                                            |===========|
";
    assert_eq!(text[expected.len()..].trim_end(), drawing[1..].trim_end(), "\n{text}");

    let svg = violation.svg();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    assert_eq!(svg.matches("#d33").count(), 3, "three are marked: {svg}");
    assert_eq!(svg.matches("<title>").count(), 6, "{svg}");
}

#[test]
fn an_answer_over_http_says_what_happened() {
    let (put, get) = (Call::Put("v".into()), Call::Get);
    let done = |read: Option<&str>| Outcome::Done { at: 7, read: read.map(Into::into) };
    let outcome = |call, status, body: &str| http::outcome(call, Some((status, body.as_bytes())), 7);
    assert_eq!(outcome(&put, 204, ""), done(None));
    assert_eq!(
        outcome(&put, 503, "not applied: no leader within the request time-out; try again\n"),
        Outcome::NotApplied
    );
    assert_eq!(outcome(&put, 507, "not applied: the disk is full\n"), Outcome::NotApplied);
    assert_eq!(outcome(&put, 504, "outcome unknown: …\n"), Outcome::Unknown);
    assert_eq!(outcome(&put, 500, ""), Outcome::Unknown);
    assert_eq!(outcome(&get, 200, "v"), done(Some("v")));
    assert_eq!(outcome(&get, 404, ""), done(None));
    assert_eq!(outcome(&get, 503, ""), Outcome::Unknown);
    assert_eq!(http::outcome(&put, None, 7), Outcome::Unknown);
}
