//! What every request passes: the token, a place in the queue, and a time limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;
use tokio::sync::OwnedSemaphorePermit;

use super::App;
use super::error::{ApiError, ApiResult};

/// A request's place in the queue; given back when the last clone is dropped, which for a stream is its end.
pub struct Ticket {
    pub deadline: tokio::time::Instant,
    timeout: Duration,
    endpoint: String,
    began: Instant,
    app: Arc<App>,
    _place: OwnedSemaphorePermit,
}

impl Ticket {
    fn take(app: &Arc<App>, endpoint: &str) -> ApiResult<Self> {
        let place = app.places.clone().try_acquire_owned().map_err(|_| {
            ApiError::busy(format!("{} requests are under way (--max-queue): retry later", app.max_queue))
        })?;
        Ok(Ticket {
            deadline: tokio::time::Instant::now() + app.timeout,
            timeout: app.timeout,
            endpoint: endpoint.into(),
            began: Instant::now(),
            app: app.clone(),
            _place: place,
        })
    }

    pub fn late(&self) -> ApiError {
        ApiError::late(self.timeout.as_secs_f64())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.app.metrics.took(&self.endpoint, self.began.elapsed());
    }
}

/// The middleware around all routes.
pub async fn admit(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let response = pass(&app, &path, request, next).await.unwrap_or_else(ApiError::into_response);
    app.metrics.answered(&path, response.status());
    response
}

async fn pass(app: &Arc<App>, path: &str, mut request: Request, next: Next) -> ApiResult<Response> {
    // Whoever looks after the process has no token.
    if path != "/health" && !authorised(app, request.headers()) {
        return Err(ApiError::unauthorized());
    }
    if request.method() != Method::POST {
        return Ok(next.run(request).await);
    }
    let ticket = Arc::new(Ticket::take(app, path)?);
    request.extensions_mut().insert(ticket.clone());
    // The body has to come within the limit as well.
    match tokio::time::timeout_at(ticket.deadline, next.run(request)).await {
        Ok(response) => Ok(response),
        Err(_) => Err(ticket.late()),
    }
}

fn authorised(app: &App, headers: &HeaderMap) -> bool {
    let Some(token) = &app.token else { return true };
    let given = headers.get(AUTHORIZATION).map(|v| v.as_bytes()).and_then(|v| v.split_at_checked(7));
    // How long it takes says nothing about the token but its length.
    matches!(given, Some((scheme, given)) if scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(given.ct_eq(token.as_bytes())))
}
