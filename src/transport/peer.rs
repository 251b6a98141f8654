//! One peer: where it is, what waits for it, what was heard from it. Plain state; the tasks that work on it are in
//! `stream`, `pipeline`, `probe`, `forward` and `snapshot`.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::handshake::{Life, Refusal};
use super::locked;
use super::outbox::Outbox;
use super::seldom::Seldom;
use super::snapshot::{SnapshotProgress, Transfers};
use crate::cluster::PeerUrl;
use crate::metrics::{self, Metrics};
use crate::window::{Seen, Window};

/// Frames that may come out of order, by the pipeline beside the stream, and still be told from repeats.
const WINDOW_FRAMES: usize = 8192;
/// Forwarded requests of ours that one peer works on at once; further ones wait.
const FORWARDED_MAX: usize = 8;
/// After a failed connection, requests other than the stream's fail at once for this long: with the stream's own tries
/// a dead peer is dialled at most 10 times a second.
const DIAL_PAUSE: Duration = Duration::from_millis(200);

pub struct Peer {
    pub id: u64,
    pub outbox: Outbox,
    /// Notified when there is a reason to dial at once.
    pub knocked: Notify,
    /// Connections that wait for the next request.
    pub idle: Mutex<Vec<SendRequest<Full<bytes::Bytes>>>>,
    pub forwarding: Semaphore,
    /// Held by the one snapshot that is on its way to this peer.
    pub sending: Arc<Semaphore>,
    pub snapshots: Transfers,
    pub figures: Figures,
    pub lines: Lines,
    /// Ends all that belongs to this peer.
    pub stop: CancellationToken,
    place: Mutex<Place>,
    heard: Mutex<Heard>,
    state: Mutex<State>,
}

struct Place {
    urls: Arc<[PeerUrl]>,
    /// Index of the URL that worked last.
    preferred: usize,
    /// Known only from its own introduction.
    visitor: bool,
    no_dial_before: Option<Instant>,
    /// Ends the connections to these URLs.
    connections: CancellationToken,
}

/// Figures that are counted often, looked up once.
pub struct Figures {
    pub sent_bytes: Counter,
    pub received_bytes: Counter,
    pub snapshot_sent_bytes: Counter,
    pub snapshot_received_bytes: Counter,
    pub dropped_messages: Counter,
}

/// Lines of the log that a peer could bring about at any rate.
#[derive(Default)]
pub struct Lines {
    superseded: Seldom,
    pub snapshot_refused: Seldom,
    pub snapshot_lost: Seldom,
}

/// The newest start of the peer that we met, and which of its frames came.
struct Heard {
    life: Life,
    window: Window,
}

impl Heard {
    fn of(life: Life) -> Self {
        Heard { life, window: Window::new(WINDOW_FRAMES) }
    }
}

#[derive(Default)]
struct State {
    standing: Option<Standing>,
    /// What the log says of it last.
    logged: Option<Standing>,
    lost: Seldom,
    round_trip: Option<Duration>,
    clock_drift_seconds: Option<f64>,
    last_error: Option<String>,
}

/// How our stream of the peer's messages stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Open,
    Unreachable,
    Refused(Refusal),
}

/// What to do with a frame.
pub enum Admission {
    New,
    Repeat,
    OldBoot,
}

/// One peer as an operator sees it.
#[derive(Debug, Clone, Serialize)]
pub struct PeerStatus {
    pub id: u64,
    pub urls: Vec<PeerUrl>,
    /// Its messages reach us.
    pub stream_in: bool,
    /// It takes our messages.
    pub stream_out: bool,
    pub round_trip_seconds: Option<f64>,
    /// Its clock less ours.
    pub clock_drift_seconds: Option<f64>,
    pub queued_messages: usize,
    pub queued_bytes: usize,
    /// The snapshot that is on its way to or from it.
    pub snapshot: Option<SnapshotProgress>,
    pub last_error: Option<String>,
}

impl Peer {
    pub fn new(id: u64, urls: Vec<PeerUrl>, visitor: bool, metrics: &Metrics, stop: CancellationToken) -> Self {
        let label = metrics::Peer { peer: id };
        Peer {
            id,
            outbox: Outbox::default(),
            knocked: Notify::new(),
            idle: Mutex::default(),
            forwarding: Semaphore::new(FORWARDED_MAX),
            sending: Arc::new(Semaphore::new(1)),
            snapshots: Transfers::default(),
            figures: Figures {
                sent_bytes: metrics.peer_sent_bytes.get_or_create(&label).clone(),
                received_bytes: metrics.peer_received_bytes.get_or_create(&label).clone(),
                snapshot_sent_bytes: metrics.peer_snapshot_sent_bytes.get_or_create(&label).clone(),
                snapshot_received_bytes: metrics.peer_snapshot_received_bytes.get_or_create(&label).clone(),
                dropped_messages: metrics.peer_dropped_messages.get_or_create(&label).clone(),
            },
            place: Mutex::new(Place {
                urls: urls.into(),
                preferred: 0,
                visitor,
                no_dial_before: None,
                connections: stop.child_token(),
            }),
            stop,
            heard: Mutex::new(Heard::of(Life { nonce: 0, boot: 0 })),
            lines: Lines::default(),
            state: Mutex::default(),
        }
    }

    /// The peer is a member, at these URLs.
    pub fn list(&self, urls: Vec<PeerUrl>) {
        let mut place = locked(&self.place);
        place.visitor = false;
        self.move_to(&mut place, urls);
    }

    /// The peer named these URLs itself. They count until it is listed: the log knows better than a flag.
    pub fn visit(&self, urls: Vec<PeerUrl>) {
        let mut place = locked(&self.place);
        if place.visitor {
            self.move_to(&mut place, urls);
        }
    }

    fn move_to(&self, place: &mut Place, urls: Vec<PeerUrl>) {
        if *place.urls == *urls {
            return;
        }
        (place.urls, place.preferred, place.no_dial_before) = (urls.into(), 0, None);
        // Whoever answers at the old address now may be anyone.
        std::mem::replace(&mut place.connections, self.stop.child_token()).cancel();
        locked(&self.idle).clear();
        self.knocked.notify_one();
    }

    /// Cancelled when the peer moves or is gone: ends what was connected by what [`Peer::urls`] said after this call.
    pub fn place(&self) -> CancellationToken {
        locked(&self.place).connections.clone()
    }

    pub fn is_visitor(&self) -> bool {
        locked(&self.place).visitor
    }

    /// The peer connected to us, so it is up: dial it now.
    pub fn knock(&self) {
        locked(&self.place).no_dial_before = None;
        self.knocked.notify_one();
    }

    /// Its URLs with their indices, the one that worked last first.
    pub fn urls(&self) -> Vec<(usize, PeerUrl)> {
        let place = locked(&self.place);
        let mut urls: Vec<_> = place.urls.iter().cloned().enumerate().collect();
        urls.rotate_left(place.preferred);
        urls
    }

    /// Whether another connection may be tried. After one that failed, one caller at a time finds out whether the peer is
    /// back, and the others fail at once.
    pub fn may_dial(&self) -> bool {
        let (mut place, now) = (locked(&self.place), Instant::now());
        match place.no_dial_before {
            None => true,
            Some(instant) if now < instant => false,
            Some(_) => {
                place.no_dial_before = Some(now + DIAL_PAUSE);
                true
            }
        }
    }

    /// How the last try to connect ended: at the URL of this index, or at none.
    pub fn dialled(&self, url: Option<usize>) {
        let mut place = locked(&self.place);
        place.no_dial_before = if url.is_none() { Some(Instant::now() + DIAL_PAUSE) } else { None };
        // The list may have changed meanwhile.
        place.preferred = url.filter(|index| *index < place.urls.len()).unwrap_or(0);
    }

    /// The peer shows itself, with the data directory that the node knows. An earlier start than one that was met is
    /// refused: it is dead and its words come late, or it runs on a copy of the directory beside the other and must end.
    /// Of another directory nothing follows for this one.
    pub fn greet(&self, life: Life) -> Result<(), Refusal> {
        let mut heard = locked(&self.heard);
        if heard.life.nonce == life.nonce && life.boot < heard.life.boot {
            if self.lines.superseded.is_due() {
                let (peer, boot, newest) = (self.id, life.boot, heard.life.boot);
                tracing::warn!(peer, boot, newest, "refused an earlier start of this member: does it run twice?");
            }
            return Err(Refusal::Superseded);
        }
        if heard.life != life {
            *heard = Heard::of(life);
        }
        Ok(())
    }

    /// Tells a new frame from a repeat, and from one that an earlier start of the peer left in the network.
    pub fn admit(&self, boot: u64, sequence: u64) -> Admission {
        let mut heard = locked(&self.heard);
        if boot < heard.life.boot {
            return Admission::OldBoot;
        }
        if boot > heard.life.boot {
            *heard = Heard::of(Life { boot, ..heard.life });
        }
        match heard.window.mark(sequence) {
            Seen::New => Admission::New,
            // Too old to tell: raft survives a lost message, and not every repeated one.
            Seen::Repeat | Seen::TooOld => Admission::Repeat,
        }
    }

    /// Records how our stream stands, and logs it if that is news. Of a stream that comes and goes the log tells at most
    /// once a second. What is left out is made up for with the next try, or was over by then.
    pub fn stand(&self, standing: Standing, error: Option<String>) {
        let mut state = locked(&self.state);
        state.standing = Some(standing);
        if error.is_some() {
            state.last_error = error;
        }
        // An open stream is told of once, so it is logged behind each loss that was.
        if state.logged == Some(standing) || (standing != Standing::Open && !state.lost.is_due()) {
            return;
        }
        state.logged = Some(standing);
        let (peer, error) = (self.id, state.last_error.as_deref().unwrap_or_default());
        match standing {
            Standing::Open => tracing::info!(peer, "connected to peer"),
            Standing::Unreachable => tracing::warn!(peer, error, "peer is unreachable"),
            Standing::Refused(refusal) => tracing::warn!(peer, error, "peer refused us: {refusal}"),
        }
    }

    /// Records an error that does not change how the stream stands.
    pub fn note(&self, error: String) {
        locked(&self.state).last_error = Some(error);
    }

    pub fn probed(&self, round_trip: Duration, clock_drift_seconds: f64) {
        let mut state = locked(&self.state);
        state.round_trip = Some(round_trip);
        state.clock_drift_seconds = Some(clock_drift_seconds);
    }

    pub fn status(&self) -> PeerStatus {
        let (queued_messages, queued_bytes) = self.outbox.queued();
        let state = locked(&self.state);
        PeerStatus {
            id: self.id,
            urls: locked(&self.place).urls.to_vec(),
            stream_in: state.standing == Some(Standing::Open),
            stream_out: self.outbox.is_attached(),
            round_trip_seconds: state.round_trip.map(|round_trip| round_trip.as_secs_f64()),
            clock_drift_seconds: state.clock_drift_seconds,
            queued_messages,
            queued_bytes,
            snapshot: self.snapshots.progress(),
            last_error: state.last_error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Peer {
        let urls = ["http://a:1", "http://b:2"].map(|url| PeerUrl::parse(url).unwrap());
        Peer::new(2, urls.into(), true, &Metrics::new(), CancellationToken::new())
    }

    #[test]
    fn a_repeat_is_known_within_a_start_and_an_older_start_is_refused() {
        let peer = peer();
        assert!(matches!(peer.admit(5, 1), Admission::New));
        assert!(matches!(peer.admit(5, 1), Admission::Repeat));
        assert!(matches!(peer.admit(6, 1), Admission::New), "another start counts anew");
        assert!(matches!(peer.admit(5, 2), Admission::OldBoot));
    }

    #[test]
    fn an_earlier_start_on_the_same_directory_is_refused() {
        let (peer, life) = (peer(), |nonce, boot| Life { nonce, boot });
        assert_eq!(peer.greet(life(1, 5)), Ok(()));
        assert!(matches!(peer.admit(5, 1), Admission::New));
        assert_eq!(peer.greet(life(1, 5)), Ok(()));
        assert!(matches!(peer.admit(5, 1), Admission::Repeat), "a second handshake of one start forgets nothing");
        assert_eq!(peer.greet(life(1, 6)), Ok(()));
        assert!(matches!(peer.admit(5, 2), Admission::OldBoot), "what the earlier one has open ends");
        assert_eq!(peer.greet(life(1, 5)), Err(Refusal::Superseded));
        assert_eq!(peer.greet(life(2, 1)), Ok(()), "whose directory counts is the node's to say");
    }

    /// A stream that breaks as soon as it is open, over and over, and in the end stays open, or away.
    #[test]
    fn the_log_is_told_seldom_and_of_the_last_in_the_end() {
        let peer = peer();
        let logged = || locked(&peer.state).logged;
        for _ in 0..10 {
            peer.stand(Standing::Unreachable, None);
            assert!(logged().is_some());
            peer.stand(Standing::Open, None);
            assert_eq!(logged(), Some(Standing::Open));
        }
        peer.stand(Standing::Unreachable, None);
        assert_eq!(logged(), Some(Standing::Open), "left out");
        locked(&peer.state).lost = Seldom::default();
        peer.stand(Standing::Unreachable, None);
        assert_eq!(logged(), Some(Standing::Unreachable), "made up for once a second has passed");
    }

    #[test]
    fn the_url_that_worked_is_tried_first() {
        let peer = peer();
        peer.dialled(Some(1));
        assert_eq!(peer.urls()[0].1.authority(), "b:2");
        peer.visit(vec![PeerUrl::parse("http://c:3").unwrap()]);
        assert_eq!(peer.urls()[0], (0, PeerUrl::parse("http://c:3").unwrap()));
    }

    #[test]
    fn what_the_log_says_of_an_address_counts_more_than_what_a_peer_says() {
        let peer = peer();
        peer.list(vec![PeerUrl::parse("http://c:3").unwrap()]);
        peer.visit(vec![PeerUrl::parse("http://d:4").unwrap()]);
        assert_eq!(peer.status().urls[0].authority(), "c:3");
    }

    #[test]
    fn a_peer_that_did_not_answer_is_left_alone_until_it_knocks() {
        let peer = peer();
        peer.dialled(None);
        assert!(!peer.may_dial());
        peer.knock();
        assert!(peer.may_dial());
    }
}
