//! What the node tells of itself to operators and their tools: `/version`, `/status`, `/livez`, `/readyz`, `/metrics`;
//! and the places that are reserved for services to come. `GET` and `HEAD` only.

use hyper::http::HeaderValue;
use hyper::{Method, StatusCode};
use tokio::time::timeout;

use super::Api;
use super::reply::{Answer, Refusal, Reply, TEXT};
use super::target::{RESERVED, Service};

const ALLOW: &str = "GET, HEAD";
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const OPENMETRICS: HeaderValue = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Without a `service`: the path is reserved, and nothing lives there.
pub async fn answer(api: &Api, method: &Method, service: Option<Service>, reply: Reply) -> Answer {
    let result = match (method, service) {
        (&Method::PUT, _) => Err(Refusal::new(
            StatusCode::CONFLICT,
            format!("not applied: reserved for services: {RESERVED}; choose another key"),
        )),
        (&Method::GET | &Method::HEAD, Some(service)) => content(api, service).await,
        (&Method::GET | &Method::HEAD, None) => {
            Err(Refusal::new(StatusCode::NOT_FOUND, "reserved for services, and nothing lives here yet"))
        }
        _ => Err(Refusal::method(ALLOW)),
    };
    match result {
        Ok((kind, content)) => reply.content(StatusCode::OK, kind, content),
        Err(refusal) => reply.refusal(&refusal),
    }
}

async fn content(api: &Api, service: Service) -> Result<(HeaderValue, String), Refusal> {
    match service {
        Service::Metrics => Ok((OPENMETRICS, api.metrics.encode())),
        // That it can say so is all there is to it.
        Service::Livez => Ok((TEXT, "ok\n".into())),
        Service::Readyz => ready(api).await.map(|()| (TEXT, "ok\n".into())),
        Service::Version => {
            let version = serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "api": ["raftexample"] });
            Ok((JSON, format!("{version}\n")))
        }
        Service::Status => Ok((JSON, status(api).await?)),
    }
}

/// A barrier that comes back proves that there is a leader and that this member has caught up with it.
async fn ready(api: &Api) -> Result<(), Refusal> {
    match timeout(api.limits.probe_time, api.service.caught_up()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(unavailable(format!("not ready: {}", Refusal::read(error).line().trim_end()))),
        Err(_) => Err(unavailable(format!(
            "not ready: no leader, or this member has not caught up, within {:?}",
            api.limits.probe_time
        ))),
    }
}

async fn status(api: &Api) -> Result<String, Refusal> {
    match timeout(api.limits.probe_time, api.service.status()).await {
        Ok(Ok(status)) => serde_json::to_string(&status).map(|json| json + "\n").map_err(|error| {
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write the status down: {error}"))
        }),
        Ok(Err(error)) => Err(Refusal::read(error)),
        Err(_) => Err(unavailable(format!("the node did not answer within {:?}", api.limits.probe_time))),
    }
}

fn unavailable(reason: String) -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, reason).retry()
}
