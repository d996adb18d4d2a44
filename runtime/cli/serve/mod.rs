//! `rewardrt serve`: completions and scores over HTTP, in the shapes that other stacks' clients know.
//!
//! A request becomes a job at once, so that the engine batches whatever is there; nobody waits in a thread of its own.

mod activation;
mod admission;
mod args;
mod completions;
mod encode;
mod error;
mod fields;
mod held;
mod listen;
mod metrics;
mod models;
mod respond;
mod rewards;
mod sampling;
mod shape;
mod stream;
mod ticket;
mod wait;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use rewardrt::{Error, ErrorKind, Result, Runtime, RuntimeOptions, RuntimeState};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinError;
use tower_http::catch_panic::CatchPanicLayer;

pub use args::Serve;
use error::{ApiError, ApiResult};
use metrics::{Metrics, Sources};
use models::{Models, Role};
use respond::json_response;
use ticket::Bounds;

/// Threads that encode and compile guides, however many requests come.
const BLOCKING_THREADS: usize = 8;

/// Time for what these threads do, at the end.
const LAST_WORK: Duration = Duration::from_secs(10);

/// What all requests share.
pub struct App {
    runtime: Runtime,
    models: Arc<Models>,
    metrics: Metrics,
    bounds: Arc<Bounds>,
    token: Option<String>,
    max_queued_tokens: usize,
    max_body: usize,
    timeout: Duration,
    fingerprint: String,
}

/// Serves until SIGINT or SIGTERM.
pub fn run(args: &Serve) -> Result<()> {
    let token = args.token_file.as_deref().map(read_token).transpose()?;
    if args.max_body > args.max_queued_bytes {
        let message = format!("--max-body {} is more than --max-queued-bytes {}", args.max_body, args.max_queued_bytes);
        return Err(Error::new(ErrorKind::Argument, message));
    }
    // Requests wait here, not there, where what was cancelled lingers for a step.
    let max_queued_tokens = args.max_queued_tokens.saturating_mul(2);
    let options = RuntimeOptions { max_queued_tokens, ..args.loading.runtime_options() };
    let runtime = Runtime::open(&options)?;
    let models = Arc::new(Models::load(&runtime, &args.loading, &args.model, &args.reward)?);
    let bounds = Arc::new(Bounds::new(args));
    let sources = Sources { runtime: runtime.clone(), models: models.clone(), bounds: bounds.clone() };
    let fingerprint = format!("rewardrt-{} {}", env!("CARGO_PKG_VERSION"), runtime.device_name());
    let app = Arc::new(App {
        runtime,
        models,
        metrics: Metrics::new(sources),
        bounds,
        token,
        max_queued_tokens: args.max_queued_tokens,
        max_body: args.max_body,
        timeout: args.timeout,
        fingerprint,
    });
    let failed = |e: std::io::Error| Error::new(ErrorKind::Io, format!("cannot start the event loop: {e}"));
    let event_loop = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(failed)?;
    let served = event_loop.block_on(serve(app, args));
    // What did not end in time is dropped, which cancels it; the last one who holds the engine waits for its step to end.
    event_loop.shutdown_timeout(LAST_WORK);
    served
}

/// One line, without the white space around it.
fn read_token(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::new(ErrorKind::Argument, format!("--token-file {}: {e}", path.display())))?;
    let token = text.trim();
    if token.is_empty() || token.contains(char::is_whitespace) {
        let message = format!("--token-file {}: it must hold one token without spaces", path.display());
        return Err(Error::new(ErrorKind::Argument, message));
    }
    Ok(token.to_owned())
}

async fn serve(app: Arc<App>, args: &Serve) -> Result<()> {
    let address = (args.host.as_str(), args.port);
    let failed = |e: std::io::Error| {
        let kind = if e.kind() == std::io::ErrorKind::AddrInUse { ErrorKind::Busy } else { ErrorKind::Io };
        Error::new(kind, format!("{}:{}: {e}", args.host, args.port))
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let mut signals = Signals::listen().map_err(failed)?;
    say(&format!("listening on http://{}", listener.local_addr().map_err(failed)?));
    let (stop, stopping) = tokio::sync::oneshot::channel();
    let mut server = tokio::spawn(listen::listen(listener, router(app), stopping));
    let ended = |ended: std::result::Result<(), JoinError>| {
        ended.map_err(|e| Error::new(ErrorKind::Internal, format!("the server ended: {e}")))
    };
    tokio::select! {
        result = &mut server => return ended(result),
        () = signals.next() => {}
    }
    say(&format!("stopping; requests under way have {} s", args.drain.as_secs_f64()));
    // A server that has ended needs no word.
    let _ = stop.send(());
    tokio::select! {
        result = &mut server => return ended(result),
        () = tokio::time::sleep(args.drain) => {}
        () = signals.next() => {}
    }
    say("requests that did not end in time are cancelled");
    Ok(())
}

/// On stderr. That nobody may read it any more is no reason to stop.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "rewardrt: {text}");
}

/// SIGINT and SIGTERM; Ctrl-C where there are no signals.
struct Signals {
    #[cfg(unix)]
    signals: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    #[cfg(unix)]
    fn listen() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals { signals: [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?] })
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        let [interrupt, terminate] = &mut self.signals;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }

    #[cfg(not(unix))]
    fn listen() -> std::io::Result<Self> {
        Ok(Signals {})
    }

    #[cfg(not(unix))]
    async fn next(&mut self) {
        // Without Ctrl-C there is nothing to wait for.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::text))
        .route("/v1/models", get(list_models))
        .route("/v1/embeddings", post(rewards::embeddings))
        .route("/classify", post(rewards::classify))
        .route("/score", post(rewards::score_pairs))
        .route("/v1/score", post(rewards::score_pairs))
        .route("/rerank", post(rewards::rerank))
        .route("/v1/rerank", post(rewards::rerank))
        .route("/v2/rerank", post(rewards::rerank))
        .route("/get_reward", post(rewards::get_reward))
        .route("/remote_rm", post(rewards::remote_rm))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(app.clone(), admission::admit))
        .layer(DefaultBodyLimit::max(app.max_body))
        .with_state(app)
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    // The panic hook has written what it said.
    ApiError::internal("an internal error; the log has more").into_response()
}

async fn no_route(request: Request) -> ApiError {
    ApiError::no_route(request.method().as_str(), request.uri().path())
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::wrong_method(request.method().as_str(), request.uri().path())
}

/// GET /v1/models.
async fn list_models(State(app): State<Arc<App>>) -> Response {
    let one = |m: &Arc<models::Served>| {
        let rule = match &m.role {
            Role::Policy => Value::Null,
            Role::Reward { rule, .. } => rule.to_string().into(),
        };
        json!({
            "id": m.name, "object": "model", "created": m.created, "owned_by": "rewardrt",
            "max_model_len": m.model.max_context(), "rule": rule, "weight_version": m.model.weights_version(),
        })
    };
    let data: Vec<Value> = app.models.iter().map(one).collect();
    json_response(StatusCode::OK, &json!({"object": "list", "data": data}))
}

/// GET /health: 200 as long as the engine takes work.
async fn health(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let state = app.runtime.state();
    if state != RuntimeState::Running {
        return Err(ApiError::unavailable(format!("the engine is {state:?}")));
    }
    Ok(json_response(StatusCode::OK, &json!({"status": "ok", "models": app.models.iter().count()})))
}

/// GET /metrics.
async fn metrics(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let text = app.metrics.encode().map_err(|e| ApiError::internal(e.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], text).into_response())
}
