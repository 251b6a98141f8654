//! A start's first half: who this member is, what its log and its newest snapshot hold; or, on a first start, founding a
//! cluster or joining one.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use raft::eraftpb::Entry;
use tokio::net::TcpListener;
use tracing::info;

use super::{Error, bind};
use crate::cluster::{Introduction, Member, PeerUrl, cluster_id};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::node;
use crate::store::{BadImage, State, read_image};
use crate::transport::{self, IntroduceError};
use crate::wal::disk::RealDisk;
use crate::wal::identity::{Identity, LOG_DIR};
use crate::wal::snapshot::{Meta, Snapshots};
use crate::wal::{self, Options, Recovered, Wal};

/// Pause before a member is asked again where this one belongs.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What a start finds in the data directory, or puts there.
pub struct Opened {
    pub identity: Identity,
    pub wal: Wal,
    pub recovered: Recovered,
    pub snapshots: Arc<Snapshots>,
    /// The snapshot that the service starts from, the founding one at first.
    pub meta: Meta,
    pub state: State,
    /// The members to connect to.
    pub members: Vec<Member>,
    /// This member's own URLs, and the listeners for them.
    pub urls: Vec<PeerUrl>,
    pub listeners: Vec<TcpListener>,
}

/// Finds out who this member is and recovers its log, or founds both.
pub async fn open(config: &Config, metrics: &Arc<Metrics>) -> Result<Opened, Error> {
    let disk = Arc::new(RealDisk);
    let log = Options { dir: config.data_dir.join(LOG_DIR), segment_bytes: config.wal_segment_bytes };
    let identity = Identity::load(disk.as_ref(), &config.data_dir)?;
    if let Some(Identity { member, .. }) = identity.filter(|identity| identity.member != config.id) {
        return Err(Error::NotTheOwner { id: config.id, owner: member, data_dir: config.data_dir.clone() });
    }
    match identity {
        Some(identity) if Wal::exists(disk.as_ref(), &log.dir)? => {
            // Where a crash came between the two, the log is there and the word of it is not.
            let identity =
                if identity.has_log { identity } else { identity.note_log(disk.as_ref(), &config.data_dir)? };
            restart(config, identity, &log, metrics).await
        }
        Some(Identity { has_log: true, .. }) => Err(wal::Error::LogMissing { log: log.dir }.into()),
        // A first start, or one that was cut short before it told anybody of itself.
        Some(_) | None => first_start(config, &log, metrics).await,
    }
}

async fn restart(config: &Config, identity: Identity, log: &Options, metrics: &Arc<Metrics>) -> Result<Opened, Error> {
    let disk = Arc::new(RealDisk);
    let (wal, mut recovered) = Wal::open(disk.clone(), log, now_micros(), metrics.clone())?;
    let snapshots = Arc::new(Snapshots::open(disk, &config.data_dir)?);
    let founding = Meta::founding(&recovered.founders);
    let base = recovered.compacted.unwrap_or((founding.index, founding.term));
    let last = base.0 + recovered.entries.len() as u64;
    let term_at = |index: u64| term_at(base, &recovered.entries, index);
    let (meta, state) = match snapshots.newest(base, last, term_at)? {
        Some(meta) => {
            let (_, image) = snapshots.read(meta.index, meta.term)?;
            let state = read_image(image).map_err(|error| match error {
                BadImage::NewerFormat(_) => Error::NewerImage { index: meta.index, error },
                BadImage::Damaged(_) | BadImage::Read(_) => Error::Image { index: meta.index, error },
            })?;
            if state.applied() != meta.index {
                return Err(Error::WrongImage { index: meta.index, found: state.applied() });
            }
            (meta, state)
        }
        None => (founding.clone(), State::founded(founding.index)),
    };
    recovered.hard_state.commit = recovered.hard_state.commit.max(meta.index);
    let members = node::members_in_log(&meta, &recovered.entries);
    check_cluster(config, &members, &recovered.founders)?;
    let urls = urls_of(&members, config.id).or_else(|| urls_of(&config.cluster, config.id)).unwrap_or_default();
    if urls.is_empty() && config.listen_peer.is_none() {
        return Err(Error::NoAddress { id: config.id });
    }
    let listeners = bind::peers(config, &urls).await?;
    Ok(Opened { identity, wal, recovered, snapshots, meta, state, members, urls, listeners })
}

async fn first_start(config: &Config, log: &Options, metrics: &Arc<Metrics>) -> Result<Opened, Error> {
    config.check_founding()?;
    let urls = urls_of(&config.cluster, config.id).unwrap_or_default();
    // Before anything is written, so that a port in use leaves no trace.
    let listeners = bind::peers(config, &urls).await?;
    let Introduction { cluster, founders, members } = if config.join {
        join(config, &urls).await?
    } else {
        let founders = config.cluster.clone();
        Introduction { cluster: cluster_id(&founders), members: founders.clone(), founders }
    };
    let disk = Arc::new(RealDisk);
    let identity = Identity::create(disk.as_ref(), &config.data_dir, cluster, config.id)?;
    let (wal, recovered) = Wal::create(disk.clone(), log, &founders, now_micros(), metrics.clone())?;
    let identity = identity.note_log(disk.as_ref(), &config.data_dir)?;
    let snapshots = Arc::new(Snapshots::open(disk, &config.data_dir)?);
    info!(data_dir = %config.data_dir.display(), "first start: the data directory is new");
    let meta = Meta::founding(&founders);
    let state = State::founded(meta.index);
    Ok(Opened { identity, wal, recovered, snapshots, meta, state, members, urls, listeners })
}

/// Asks the listed members where this one belongs, until one knows. Refused only when all that answer say no.
async fn join(config: &Config, urls: &[PeerUrl]) -> Result<Introduction, Error> {
    let others: Vec<&PeerUrl> =
        config.cluster.iter().filter(|member| member.id != config.id).flat_map(|member| &member.urls).collect();
    if others.is_empty() {
        return Err(Error::NotAdded { id: config.id, refusals: "--cluster lists no other member to ask".to_owned() });
    }
    let patience = Instant::now() + config.request_timeout;
    let mut told = false;
    loop {
        let mut refusals = Vec::new();
        let mut silent = 0;
        for url in &others {
            match transport::introduce(config.id, urls, url).await {
                Ok(body) => match serde_json::from_slice(&body) {
                    Ok(introduction) => return Ok(introduction),
                    Err(error) => refusals.push(format!("{url} gives an answer that cannot be read: {error}")),
                },
                Err(IntroduceError::NotAMember(reason)) => refusals.push(format!("{url} says: {reason}")),
                Err(IntroduceError::Removed) => return Err(Error::WasRemoved { id: config.id }),
                Err(IntroduceError::Unreachable(_)) => silent += 1,
            }
        }
        // A member that lags behind may say no to whom the leader has added a moment ago.
        if silent < others.len() && Instant::now() > patience {
            return Err(Error::NotAdded { id: config.id, refusals: refusals.join("; ") });
        }
        if !told {
            info!("joining: waiting for a member that knows this one");
            told = true;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// A list may be stale or left away, for the members in the log count. One that shares no address with them is meant for
/// another cluster, and to serve this one in its place would answer for data that is not there.
fn check_cluster(config: &Config, members: &[Member], founders: &[Member]) -> Result<(), Error> {
    let known = |url: &PeerUrl| members.iter().chain(founders).any(|member| member.urls.contains(url));
    if config.is_default_cluster() || config.cluster.iter().flat_map(|member| &member.urls).any(known) {
        return Ok(());
    }
    let list: Vec<String> = members.iter().flat_map(|member| &member.urls).map(ToString::to_string).collect();
    Err(Error::AnotherCluster { data_dir: config.data_dir.clone(), members: list.join(",") })
}

fn urls_of(members: &[Member], id: u64) -> Option<Vec<PeerUrl>> {
    members.iter().find(|member| member.id == id).map(|member| member.urls.clone())
}

fn term_at(base: (u64, u64), entries: &[Entry], index: u64) -> Option<u64> {
    match index.checked_sub(base.0)? {
        0 => Some(base.1),
        nth => entries.get(nth as usize - 1).map(|entry| entry.term),
    }
}

fn now_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
