//! A start's first half: who this member is, what its log and its newest snapshot hold; or, on a first start, founding a
//! cluster or joining one.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tracing::info;

use super::data::{Data, Place};
use super::{Error, bind, finished, policy};
use crate::blocking;
use crate::cluster::{Introduction, Member, PeerUrl, cluster_id};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::transport::{self, IntroduceError};
use crate::wal::disk::RealDisk;
use crate::wal::identity::Identity;

/// Pause before a member is asked again where this one belongs.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Between two lines of the log about that.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// What a start finds or makes.
pub struct Opened {
    pub data: Data,
    /// The members to connect to.
    pub members: Vec<Member>,
    /// This member's own URLs, and the listeners for them.
    pub urls: Vec<PeerUrl>,
    pub listeners: Vec<TcpListener>,
}

/// Finds out who this member is and recovers its log, or founds both.
pub async fn open(config: &Config, metrics: &Arc<Metrics>) -> Result<Opened, Error> {
    let place = Place {
        disk: Arc::new(RealDisk),
        data_dir: config.data_dir.clone(),
        segment_bytes: config.wal_segment_bytes,
        policy: policy(config),
        metrics: metrics.clone(),
    };
    match place.used_by(config.id)? {
        Some(identity) => restart(config, place, identity).await,
        None => first_start(config, &place).await,
    }
}

async fn restart(config: &Config, place: Place, identity: Identity) -> Result<Opened, Error> {
    // A long log takes seconds, in which the process can still be told to end.
    let recovered = blocking::run(move || place.recover(identity, now_micros())).await;
    let data = finished(recovered)?;
    let members = data.resume.members_in_log();
    check_cluster(config, &members, &data.recovered.founders)?;
    let urls = urls_of(&members, config.id).or_else(|| urls_of(&config.cluster, config.id)).unwrap_or_default();
    if urls.is_empty() && config.listen_peer.is_none() {
        return Err(Error::NoAddress { id: config.id });
    }
    let listeners = bind::peers(config, &urls).await?;
    Ok(Opened { data, members, urls, listeners })
}

async fn first_start(config: &Config, place: &Place) -> Result<Opened, Error> {
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
    let data = place.found(cluster, config.id, &founders, now_micros())?;
    info!(data_dir = %config.data_dir.display(), "first start: the data directory is new");
    Ok(Opened { data, members, urls, listeners })
}

/// Asks the listed members where this one belongs, until one knows. Refused only when all that answer say no.
async fn join(config: &Config, urls: &[PeerUrl]) -> Result<Introduction, Error> {
    let others: Vec<&PeerUrl> =
        config.cluster.iter().filter(|member| member.id != config.id).flat_map(|member| &member.urls).collect();
    if others.is_empty() {
        return Err(Error::NotAdded { id: config.id, refusals: "--cluster lists no other member to ask".to_owned() });
    }
    let patience = Instant::now() + config.request_timeout;
    let mut told: Option<Instant> = None;
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
        if told.is_none_or(|last| last.elapsed() >= TELL_AGAIN) {
            let (asked, why) = (others.len(), refusals.join("; "));
            info!(asked, silent, why, "joining: waiting for a member that knows this one");
            told = Some(Instant::now());
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// A list may be stale or left away, for the members in the log count. One that shares no address with them is meant for
/// another cluster, and to serve this one in its place would answer for data that is not there.
fn check_cluster(config: &Config, members: &[Member], founders: &[Member]) -> Result<(), Error> {
    // A newcomer that was killed before it had the log knows only the founders, who may all be gone.
    let knows_itself = |known: &[Member]| known.iter().any(|member| member.id == config.id);
    if !knows_itself(members) && !knows_itself(founders) {
        return Ok(());
    }
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

fn now_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(id: u64, list: &str) -> Config {
        let args = ["raftkv", "--id", &id.to_string(), "--join", "--cluster", list].map(Into::into);
        crate::cli::parse(args.into_iter()).expect("a command line").config
    }

    fn member(id: u64, url: &str) -> Member {
        Member { id, urls: vec![PeerUrl::parse(url).expect("a URL")] }
    }

    #[test]
    fn a_list_that_names_nobody_whom_the_directory_knows_is_of_another_cluster() {
        let founders = [member(1, "http://a:1")];
        let members = [member(2, "http://b:1")];
        let checked = |list| check_cluster(&config(2, list), &members, &founders).is_ok();
        assert!(checked("http://a:1,http://x:1"), "stale, and of this cluster");
        assert!(checked("http://x:1,http://b:1"));
        assert!(!checked("http://x:1,http://y:1"));
    }

    /// The list has who is there today; the directory only knows founders that are gone.
    #[test]
    fn a_newcomer_that_was_killed_before_it_had_the_log_may_start_again() {
        let founders = [member(1, "http://a:1")];
        assert!(check_cluster(&config(3, "http://x:1,http://b:1,http://c:1"), &founders, &founders).is_ok());
    }
}
