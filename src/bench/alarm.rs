//! Wakes the clients of an open loop when their next requests are due. The runtime's own timer counts whole milliseconds,
//! which is longer than a read takes: on Linux the kernel's timer is asked instead, one for all clients of a thread, for
//! each is an open file.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};

#[cfg(target_os = "linux")]
use self::kernel::Timer;
#[cfg(not(target_os = "linux"))]
use self::runtime::Timer;

/// All alarms of a thread.
#[derive(Debug, Clone)]
pub struct Alarms {
    waiting: Rc<Waiting>,
    /// Ends the timer's task with the last that could set an alarm.
    _bell: Rc<Bell>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By when they are due, then by when they were set.
    wakers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    set: RefCell<u64>,
    /// One is due before all that were waited for.
    earlier: Notify,
}

#[derive(Debug)]
struct Bell(AbortHandle);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Alarms {
    /// Must be called on a `LocalSet`.
    pub fn start() -> io::Result<Self> {
        let (timer, waiting) = (Timer::new()?, Rc::new(Waiting::default()));
        let bell = spawn_local(ring(timer, waiting.clone()));
        Ok(Alarms { waiting, _bell: Rc::new(Bell(bell.abort_handle())) })
    }

    /// Returns at `instant` or after it. May be dropped and called again.
    pub async fn wait(&self, instant: Instant) {
        let mut place = None;
        poll_fn(|cx| {
            if Instant::now() >= instant {
                return Poll::Ready(());
            }
            let place = place.get_or_insert_with(|| Place::new(&self.waiting, instant));
            place.occupy(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

/// Of one that waits; given up when dropped.
struct Place<'a> {
    waiting: &'a Waiting,
    key: (Instant, u64),
}

impl<'a> Place<'a> {
    fn new(waiting: &'a Waiting, instant: Instant) -> Self {
        let mut set = waiting.set.borrow_mut();
        *set += 1;
        Place { waiting, key: (instant, *set) }
    }

    fn occupy(&self, waker: &Waker) {
        let mut wakers = self.waiting.wakers.borrow_mut();
        if wakers.first_key_value().is_none_or(|(first, _)| self.key < *first) {
            self.waiting.earlier.notify_one();
        }
        wakers.insert(self.key, waker.clone());
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.wakers.borrow_mut().remove(&self.key);
    }
}

/// Wakes whoever is due, for ever.
async fn ring(mut timer: Timer, waiting: Rc<Waiting>) {
    loop {
        let now = Instant::now();
        let next = loop {
            let mut wakers = waiting.wakers.borrow_mut();
            let Some(first) = wakers.first_entry() else { break None };
            if first.key().0 > now {
                break Some(first.key().0);
            }
            first.remove().wake();
        };
        let due = async {
            match next {
                Some(instant) => timer.wait(instant).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = waiting.earlier.notified() => {}
            () = due => {}
        }
    }
}

#[cfg(target_os = "linux")]
mod kernel {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::time::Instant;

    use rustix::io::{Errno, read};
    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
    };
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    #[derive(Debug)]
    pub struct Timer(AsyncFd<OwnedFd>);

    impl Timer {
        #[allow(
            deprecated,
            reason = "what replaces it is unsafe, for types that lend a descriptor; this one owns it for as long"
        )]
        pub fn new() -> io::Result<Self> {
            let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
            Ok(Timer(AsyncFd::with_interest(timer, Interest::READABLE)?))
        }

        /// Returns at `instant` or after it. May be dropped and called again.
        pub async fn wait(&mut self, instant: Instant) {
            if self.wait_for_kernel(instant).await.is_err() {
                // A coarse alarm is better than none.
                tokio::time::sleep_until(instant.into()).await;
            }
        }

        async fn wait_for_kernel(&mut self, instant: Instant) -> io::Result<()> {
            let left = instant.saturating_duration_since(Instant::now());
            // A timer set to nothing is one that is switched off.
            let tv_nsec = i64::from(left.subsec_nanos().max(u32::from(left.as_secs() == 0)));
            let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec };
            let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
            timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
            loop {
                let mut ready = self.0.readable().await?;
                match read(self.0.get_ref(), &mut [0; 8]) {
                    Ok(_) => return Ok(()),
                    Err(Errno::AGAIN) => ready.clear_ready(),
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod runtime {
    use std::io;
    use std::time::Instant;

    #[derive(Debug)]
    pub struct Timer;

    impl Timer {
        pub fn new() -> io::Result<Self> {
            Ok(Timer)
        }

        pub async fn wait(&mut self, instant: Instant) {
            tokio::time::sleep_until(instant.into()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::task::LocalSet;

    use super::*;

    #[tokio::test]
    async fn it_wakes_when_it_is_due_and_again() {
        let body = async {
            let alarms = Alarms::start().unwrap();
            for micros in [0, 300, 2000] {
                let due = Instant::now() + Duration::from_micros(micros);
                // Asked anew, as one branch of a `select!` is.
                tokio::select! {
                    biased;
                    () = alarms.wait(due + Duration::from_secs(3600)) => panic!("an hour went by"),
                    () = std::future::ready(()) => {}
                }
                alarms.wait(due).await;
                assert!(Instant::now() >= due);
            }
            assert!(alarms.waiting.wakers.borrow().is_empty(), "a wait that is dropped leaves nothing behind");
        };
        LocalSet::new().run_until(body).await;
    }

    /// The one that is due first is set last.
    #[tokio::test]
    async fn one_timer_wakes_all_in_their_order() {
        let body = async {
            let (alarms, woken) = (Alarms::start().unwrap(), Rc::new(RefCell::new(Vec::new())));
            let begin = Instant::now();
            let tasks = [30, 20, 10].map(|millis| {
                let (alarms, woken) = (alarms.clone(), woken.clone());
                spawn_local(async move {
                    alarms.wait(begin + Duration::from_millis(millis)).await;
                    woken.borrow_mut().push(millis);
                })
            });
            for task in tasks {
                task.await.unwrap();
            }
            assert_eq!(*woken.borrow(), [10, 20, 30]);
        };
        LocalSet::new().run_until(body).await;
    }
}
