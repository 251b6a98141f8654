//! Wakes a client of an open loop when its next request is due. The runtime's own timer counts whole milliseconds, which
//! is longer than a read takes: on Linux the kernel's timer is asked instead.

#[cfg(target_os = "linux")]
pub use kernel::Alarm;
#[cfg(not(target_os = "linux"))]
pub use runtime::Alarm;

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
    pub struct Alarm {
        timer: AsyncFd<OwnedFd>,
        set: Option<Instant>,
    }

    impl Alarm {
        #[allow(
            deprecated,
            reason = "what replaces it is unsafe, for types that lend a descriptor; this one owns it for as long"
        )]
        pub fn new() -> io::Result<Self> {
            let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
            Ok(Alarm { timer: AsyncFd::with_interest(timer, Interest::READABLE)?, set: None })
        }

        /// Returns at `instant` or after it. May be dropped and called again.
        pub async fn wait(&mut self, instant: Instant) -> io::Result<()> {
            if self.set != Some(instant) {
                let left = instant.saturating_duration_since(Instant::now());
                // A timer set to nothing is one that is switched off.
                let tv_nsec = i64::from(left.subsec_nanos().max(u32::from(left.as_secs() == 0)));
                let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec };
                let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
                timerfd_settime(
                    self.timer.get_ref(),
                    TimerfdTimerFlags::empty(),
                    &Itimerspec { it_interval, it_value },
                )?;
                self.set = Some(instant);
            }
            loop {
                let mut ready = self.timer.readable().await?;
                match read(self.timer.get_ref(), &mut [0; 8]) {
                    Ok(_) => {
                        self.set = None;
                        return Ok(());
                    }
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
    pub struct Alarm;

    impl Alarm {
        pub fn new() -> io::Result<Self> {
            Ok(Alarm)
        }

        pub async fn wait(&mut self, instant: Instant) -> io::Result<()> {
            tokio::time::sleep_until(instant.into()).await;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[tokio::test]
    async fn it_wakes_when_it_is_due_and_again() {
        let mut alarm = Alarm::new().unwrap();
        for micros in [0, 300, 2000] {
            let due = Instant::now() + Duration::from_micros(micros);
            // Asked anew, as one branch of a `select!` is.
            tokio::select! {
                biased;
                _ = alarm.wait(due + Duration::from_secs(3600)) => panic!("an hour went by"),
                () = std::future::ready(()) => {}
            }
            alarm.wait(due).await.unwrap();
            assert!(Instant::now() >= due);
        }
    }
}
