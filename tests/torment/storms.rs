//! Faults of the network, one after the other, until it is to be calm. Run by a thread of its own beside the faults of the
//! members, so that each meets the other.

use crate::course::Course;
use crate::dice::Dice;
use crate::network::{Link, Network, Weather};
use crate::options::Fault;

/// Rages until the course is calm, and leaves a network without a fault.
pub fn rage(course: &Course, network: &Network, faults: &[Fault], mut dice: Dice) -> anyhow::Result<()> {
    let kinds: Vec<Fault> = faults
        .iter()
        .filter(|fault| fault.is_of_the_network())
        .flat_map(|fault| std::iter::repeat_n(*fault, fault.weight()))
        .collect();
    while !kinds.is_empty() && course.calm.rest(dice.millis(100..1_200)) {
        let kind = dice.pick(&kinds);
        // Of its own, for how much a storm asks of its dice depends on how many members there are.
        let weather = storm(course, kind, &mut Dice::new(dice.next(), 0));
        if weather.is_empty() {
            // Nobody to part from.
            continue;
        }
        let (what, hold) = (name(kind), dice.millis(200..3_000));
        course.note(&format!("{what} for {} ms: {weather:?}", hold.as_millis()));
        network.set(weather)?;
        course.calm.rest(hold);
        network.set(Weather::new())?;
        course.note(&format!("{what} is over"));
        course.count(what, 1);
    }
    Ok(())
}

fn name(kind: Fault) -> &'static str {
    match kind {
        Fault::Partition => "partitions",
        Fault::OneWay => "one-way cuts",
        Fault::Slow => "slow links",
        Fault::Loss => "losses",
        Fault::Trickle => "trickles",
        Fault::Packets => "packet losses",
        other => unreachable!("{other:?} is no fault of the network"),
    }
}

fn storm(course: &Course, kind: Fault, dice: &mut Dice) -> Weather {
    let mut ids: Vec<u64> = course.roll().into_iter().map(|(id, _)| id).collect();
    let victim = course.victim(dice);
    let links = |ids: &[u64]| {
        let pairs = ids.iter().flat_map(|from| ids.iter().map(|to| (*from, *to)));
        pairs.filter(|(from, to)| from != to).collect::<Vec<_>>()
    };
    match kind {
        Fault::Partition => {
            // The victim is on the side that is cut off first; how many go with it, and whether some are heard by both
            // sides, is chance.
            dice.shuffle(&mut ids);
            ids.sort_by_key(|id| *id != victim);
            let size = 1 + dice.below(ids.len().max(2) - 1);
            let (left, right) = ids.split_at(size.min(ids.len()));
            let right = if right.len() > 1 && dice.chance(25) { &right[1..] } else { right };
            let across = left.iter().flat_map(|a| right.iter().flat_map(move |b| [(*a, *b), (*b, *a)]));
            across.map(|link| (link, Link::Cut)).collect()
        }
        Fault::OneWay => {
            let is_heard = dice.chance(50);
            let mut cut = links(&ids);
            cut.retain(|(from, to)| victim == if is_heard { *to } else { *from });
            cut.into_iter().map(|link| (link, Link::Cut)).collect()
        }
        Fault::Slow => {
            let delay = dice.millis(5..300);
            some(dice, &links(&ids), victim).into_iter().map(|link| (link, Link::Slow(delay))).collect()
        }
        Fault::Loss => {
            let of = dice.pick(&[1, 5, 50]);
            some(dice, &links(&ids), victim).into_iter().map(|link| (link, Link::Lossy(of))).collect()
        }
        Fault::Trickle => {
            let pause = dice.millis(1..10);
            some(dice, &links(&ids), victim).into_iter().map(|link| (link, Link::Trickle(pause))).collect()
        }
        Fault::Packets => {
            let percent = dice.pick(&[5, 20, 50, 100, 100]);
            some(dice, &links(&ids), victim).into_iter().map(|link| (link, Link::Packets(percent))).collect()
        }
        other => unreachable!("{other:?} is no fault of the network"),
    }
}

/// All links, the victim's, or only one.
fn some(dice: &mut Dice, links: &[(u64, u64)], victim: u64) -> Vec<(u64, u64)> {
    if links.is_empty() {
        return Vec::new();
    }
    match dice.below(3) {
        0 => links.to_vec(),
        1 => links.iter().copied().filter(|(from, to)| [*from, *to].contains(&victim)).collect(),
        _ => vec![dice.pick(links)],
    }
}
