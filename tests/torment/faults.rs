//! Faults of the members, one after the other: each is made, mended, and what must follow from it is asked for.

use std::fs;

use anyhow::ensure;

use crate::course::{ask, poll};
use crate::dice::Dice;
use crate::flip::flip;
use crate::options::Fault;
use crate::world::{PATIENCE, World};

/// Makes one fault, and mends it.
pub fn make(world: &mut World<'_>, fault: Fault, dice: &mut Dice) -> anyhow::Result<()> {
    match fault {
        Fault::Kill => kill(world, dice),
        Fault::Pause => pause(world, dice),
        Fault::Wipe => wipe(world, dice),
        Fault::Flip => flip_a_bit(world, dice),
        Fault::Churn => churn(world, dice),
        Fault::Fsync => fail_a_sync(world, dice),
        Fault::DiskFull => fill_disks(world, dice),
        Fault::PowerCut => cut_power(world, dice),
        Fault::Partition | Fault::OneWay | Fault::Slow | Fault::Loss | Fault::Trickle | Fault::Packets => {
            unreachable!("{fault:?} is a storm's")
        }
    }
}

/// Positions of one member, most of the time; else of a majority, or all.
fn victims(world: &World<'_>, dice: &mut Dice) -> Vec<usize> {
    let count = world.members.len();
    let first = world.position(world.course.victim(dice));
    let mut all: Vec<usize> = (0..count).collect();
    dice.shuffle(&mut all);
    all.sort_by_key(|at| *at != first);
    all.truncate(match dice.below(100) {
        0..70 => 1,
        70..85 => count / 2 + 1,
        _ => count,
    });
    all
}

fn ids(world: &World<'_>, positions: &[usize]) -> Vec<u64> {
    positions.iter().map(|at| world.members[*at].id).collect()
}

fn kill(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    let victims = victims(world, dice);
    world.course.note(&format!("kill {:?}", ids(world, &victims)));
    for at in &victims {
        world.kill(*at)?;
    }
    world.course.calm.rest(dice.millis(0..1_000));
    for at in &victims {
        world.start(*at)?;
        // Again, while it starts.
        if dice.chance(20) {
            world.course.calm.rest(dice.millis(0..150));
            world.kill(*at)?;
            world.start(*at)?;
        }
    }
    if dice.chance(70) {
        world.wait_ready()?;
    }
    Ok(())
}

fn pause(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    let victims = victims(world, dice);
    let hold = dice.millis(50..4_000);
    world.course.note(&format!("pause {:?} for {} ms", ids(world, &victims), hold.as_millis()));
    for at in &victims {
        world.pause(*at)?;
    }
    world.course.calm.rest(hold);
    for at in &victims {
        world.resume(*at)?;
    }
    world.course.count("pauses", victims.len() as u64);
    Ok(())
}

fn wipe(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    // What a member has told nobody, nobody can miss.
    world.wait_ready()?;
    let id = world.course.victim(dice);
    let at = world.position(id);
    world.course.note(&format!("wipe {id}"));
    world.kill(at)?;
    world.wipe(at)?;
    world.start(at)?;
    let (code, last) = world.ended(at, "its directory was wiped")?;
    // Told by a peer that it has another directory, or by the leader that it has less than it acknowledged.
    let is_clear = (last.contains("wiped") || last.contains("its disk lost data")) && last.contains("new ID");
    ensure!(code == Some(1) && is_clear, "member {id} was wiped and ended with {code:?}: {last}");
    world.course.count("wiped", 1);
    replace(world, id, dice)
}

fn flip_a_bit(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    world.wait_ready()?;
    let id = world.course.victim(dice);
    let at = world.position(id);
    world.kill(at)?;
    let Some(flipped) = flip(&world.members[at].data_dir(), dice)? else {
        return world.start(at);
    };
    world.course.note(&format!("flip in {id}: {flipped}"));
    world.course.count("flips", 1);
    let Some((code, last)) = world.start_or_refuse(at)? else {
        return Ok(());
    };
    let file = flipped.file.to_string_lossy().into_owned();
    // Where the last snapshot is damaged and the log begins behind it, the directory is what must be restored.
    let dir = flipped.file.parent().expect("a file in a directory").to_string_lossy().into_owned();
    let is_named = last.contains(&file) || file.ends_with(".snap") && last.contains(&dir);
    ensure!(code == Some(1) && is_named, "after a flip of {flipped}, member {id} ended with {code:?}: {last}");
    world.course.count("flips refused", 1);
    replace(world, id, dice)
}

/// Another machine instead of one that is lost.
fn replace(world: &mut World<'_>, id: u64, dice: &mut Dice) -> anyhow::Result<()> {
    world.remove(id, dice)?;
    world.add(dice)
}

fn churn(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    world.wait_ready()?;
    let grows_first = world.members.len() < 3 || dice.chance(60);
    world.course.note(if grows_first { "one joins, one leaves" } else { "one leaves, one joins" });
    if grows_first {
        world.add(dice)?;
    }
    let id = world.course.victim(dice);
    world.remove(id, dice)?;
    if !grows_first {
        world.add(dice)?;
    }
    Ok(())
}

fn fail_a_sync(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    world.wait_ready()?;
    let id = world.course.victim(dice);
    let at = world.position(id);
    world.course.note(&format!("a sync of {id} fails"));
    fs::write(world.members[at].trigger(), "")?;
    let (code, last) = world.ended(at, "a sync of its log failed")?;
    let is_clear = last.contains("sync") && last.contains("/wal/") && last.contains("os error 5");
    ensure!(code == Some(1) && is_clear, "a sync of member {id} failed and it ended with {code:?}: {last}");
    world.course.count("failed syncs", 1);
    world.start(at)
}

/// All disks at once: so no member can do for another, and writes are refused.
fn fill_disks(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    world.wait_ready()?;
    world.course.note("the disks fill up");
    for member in &world.members {
        member.disk.as_ref().expect("a disk of its own").fill()?;
    }
    let value = vec![b'x'; 1 << 20];
    let ports: Vec<u16> = world.members.iter().map(|member| member.port).collect();
    let mut write = |key: &str| ask("PUT", dice.pick(&ports), key, &value, crate::clients::PATIENCE).ok();
    poll("a write is refused for want of room", PATIENCE, || write("/large").filter(|answer| answer.status == 507))?;
    world.check()?;
    for member in &world.members {
        member.disk.as_ref().expect("a disk of its own").make_room()?;
    }
    world.course.note("the disks have room again");
    poll("a write is taken again", PATIENCE, || write("/large").filter(|answer| answer.status == 204))?;
    world.course.count("full disks", 1);
    Ok(())
}

fn cut_power(world: &mut World<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    world.check()?;
    let victims = victims(world, dice);
    world.course.note(&format!("power cut of {:?}", ids(world, &victims)));
    let power_cut = world.helpers.power_cut.clone().expect("built for this fault");
    for at in &victims {
        world.members[*at].disk.as_ref().expect("a disk of its own").cut(&power_cut)?;
    }
    for at in &victims {
        world.kill_in_any_state(*at)?;
    }
    for at in &victims {
        world.members[*at].disk.as_ref().expect("a disk of its own").remount()?;
    }
    world.course.count("power cuts", victims.len() as u64);
    world.course.calm.rest(dice.millis(0..500));
    for at in &victims {
        world.start(*at)?;
    }
    if dice.chance(70) {
        world.wait_ready()?;
    }
    Ok(())
}
