//! The Management API, one method a call.

mod frames;
mod streams;

pub use streams::{EventStream, LogFollower};

use crate::{api_url::ApiUrl, error::CloudError};
use frames::FrameStream;
use reqwest::{Method, RequestBuilder, Response, StatusCode, header};
use serde::{Serialize, de::DeserializeOwned};
use std::{fmt, time::Duration};
use systemprompt_contract::{
    ApiError, CheckoutCreated, CheckoutId, CheckoutRequest, CheckoutState, Data, DeployAccepted, DeployRequest,
    ErrorBody, ErrorCode, LogPage, Me, OperationId, OperationView, Plan, RegistryToken, RequestId, Secret,
    SetupRequest, SignedIn, TenantId, TenantStatusView, TenantSummary, TenantView, TokenExchange, paths, token,
};

/// A call that takes longer than this has failed; streams have no such limit.
const CALL_WITHIN: Duration = Duration::from_secs(30);
const EXCERPT: usize = 300;

/// Calls one Management API with one token.
///
/// Cheap to clone. Every method may be cancelled by dropping its future; the server decides by itself what became of
/// a call that had reached it, which is why the changing ones take an idempotency key or can be repeated.
#[derive(Clone)]
pub struct CloudApiClient {
    api_url: ApiUrl,
    token: Option<Secret>,
    http: reqwest::Client,
}

impl fmt::Debug for CloudApiClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudApiClient").field("api_url", &self.api_url).finish_non_exhaustive()
    }
}

impl CloudApiClient {
    /// A client that shows `token` to `api_url` and to nobody else.
    pub fn new(api_url: ApiUrl, token: Secret, http: reqwest::Client) -> Self {
        Self { api_url, token: Some(token), http }
    }

    /// A client for the calls that make a token.
    pub fn without_token(api_url: ApiUrl, http: reqwest::Client) -> Self {
        Self { api_url, token: None, http }
    }

    /// Whom it calls.
    pub fn api_url(&self) -> &ApiUrl {
        &self.api_url
    }

    /// The HTTP client, for the registry of the same cloud.
    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }

    /// Who the token belongs to, and the tenants it may see.
    ///
    /// # Errors
    /// [`CloudError`], as every method here.
    pub async fn me(&self) -> Result<Me, CloudError> {
        self.get(paths::ME).await
    }

    /// What can be bought.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn plans(&self) -> Result<Vec<Plan>, CloudError> {
        self.get(paths::PLANS).await
    }

    /// Starts a checkout. The same `idempotency_key` gets the same checkout.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn create_checkout(
        &self,
        request: &CheckoutRequest,
        idempotency_key: &str,
    ) -> Result<CheckoutCreated, CloudError> {
        let call = self.request(Method::POST, paths::CHECKOUT).header("idempotency-key", idempotency_key);
        self.read(call.json(request)).await
    }

    /// Where a checkout stands.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn checkout(&self, id: CheckoutId) -> Result<CheckoutState, CloudError> {
        self.get_data(&paths::checkout(id, "")).await
    }

    /// Confirms a checkout as the operator of an installation with manual billing; repeating it changes nothing.
    ///
    /// # Errors
    /// [`CloudError`]; `forbidden` for everybody else.
    pub async fn confirm_checkout(&self, id: CheckoutId) -> Result<CheckoutState, CloudError> {
        let path = paths::checkout(id, "/confirm");
        self.read(self.request(Method::POST, &path)).await.map(|answer: Data<_>| answer.data)
    }

    /// The tenants of this account.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn tenants(&self) -> Result<Vec<TenantSummary>, CloudError> {
        self.get_data(paths::TENANTS).await
    }

    /// One tenant.
    ///
    /// # Errors
    /// [`CloudError`]; `not_found` also when it is not yours.
    pub async fn tenant(&self, id: TenantId) -> Result<TenantView, CloudError> {
        self.get_data(&paths::tenant(id, "")).await
    }

    /// Where a tenant stands, with what a person should know.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn status(&self, id: TenantId) -> Result<TenantStatusView, CloudError> {
        self.get_data(&paths::tenant(id, "/status")).await
    }

    /// Takes a tenant out of service; with `purge` its data goes at once, else after 48 hours. Answers when that is
    /// recorded; the operation does it.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn delete_tenant(&self, id: TenantId, purge: bool) -> Result<OperationId, CloudError> {
        #[derive(serde::Deserialize)]
        struct Started {
            operation_id: OperationId,
        }
        let query = if purge { "?purge=true" } else { "" };
        let path = paths::tenant(id, query);
        let call = self.request(Method::DELETE, &path).header("idempotency-key", token::random_text().as_str());
        self.read(call).await.map(|answer: Data<Started>| answer.data.operation_id)
    }

    /// One durable operation.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn operation(&self, id: OperationId) -> Result<OperationView, CloudError> {
        self.get_data(&paths::operation(id)).await
    }

    /// A token of ten minutes for pushing this tenant's image.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn registry_token(&self, id: TenantId) -> Result<RegistryToken, CloudError> {
        self.get_data(&paths::tenant(id, "/registry-token")).await
    }

    /// Asks for a deploy of a pushed image. The same `idempotency_key` gets the same answer and starts nothing twice.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn deploy(
        &self,
        id: TenantId,
        request: &DeployRequest,
        idempotency_key: &str,
    ) -> Result<DeployAccepted, CloudError> {
        let path = paths::tenant(id, "/deploy");
        let call = self.request(Method::POST, &path).header("idempotency-key", idempotency_key).json(request);
        self.read(call).await.map(|answer: Data<_>| answer.data)
    }

    /// The newest `lines` lines of the newest instance, oldest first.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn logs(&self, id: TenantId, lines: usize) -> Result<LogPage, CloudError> {
        self.get(&paths::tenant(id, &format!("/logs?lines={lines}"))).await
    }

    /// The newest `lines` lines and every one that follows, over restarts and releases.
    pub fn follow_logs(&self, id: TenantId, lines: usize) -> LogFollower {
        let path = paths::tenant(id, &format!("/logs?lines={lines}&follow=true"));
        LogFollower::new(FrameStream::new(self.clone(), path))
    }

    /// A tenant's events from the beginning, then live.
    pub fn tenant_events(&self, id: TenantId) -> EventStream {
        EventStream::new(FrameStream::new(self.clone(), paths::tenant(id, "/events")))
    }

    /// A checkout's events from the beginning, then live.
    pub fn checkout_events(&self, id: CheckoutId) -> EventStream {
        EventStream::new(FrameStream::new(self.clone(), paths::checkout(id, "/events")))
    }

    /// Exchanges the code of the browser flow; a code works once.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn exchange_token(&self, exchange: &TokenExchange) -> Result<SignedIn, CloudError> {
        self.post(paths::TOKEN, exchange).await
    }

    /// Makes the first administrator; works once in the life of an installation.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn setup(&self, request: &SetupRequest) -> Result<SignedIn, CloudError> {
        self.post(paths::SETUP, request).await
    }

    /// Revokes the token this client calls with.
    ///
    /// # Errors
    /// [`CloudError`].
    pub async fn logout(&self) -> Result<(), CloudError> {
        let answer = self.send(self.request(Method::POST, paths::LOGOUT).timeout(CALL_WITHIN)).await?;
        drop(answer);
        Ok(())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CloudError> {
        self.read(self.request(Method::GET, path)).await
    }

    async fn get_data<T: DeserializeOwned>(&self, path: &str) -> Result<T, CloudError> {
        self.get(path).await.map(|answer: Data<T>| answer.data)
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &(impl Serialize + Sync)) -> Result<T, CloudError> {
        self.read(self.request(Method::POST, path).json(body)).await
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, self.api_url.join(path)).header(header::ACCEPT, "application/json");
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    async fn read<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, CloudError> {
        let answer = self.send(request.timeout(CALL_WITHIN)).await?;
        let status = answer.status().as_u16();
        let body = answer.bytes().await.map_err(|error| CloudError::transport(&self.api_url, &error))?;
        serde_json::from_slice(&body)
            .map_err(|error| self.unexpected(status, &format!("{error} in {}", excerpt(&body))))
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, CloudError> {
        let answer = request.send().await.map_err(|error| CloudError::transport(&self.api_url, &error))?;
        if answer.status().is_success() { Ok(answer) } else { Err(self.refusal(answer).await) }
    }

    async fn refusal(&self, answer: Response) -> CloudError {
        let status = answer.status();
        // A body that cannot be read leaves the status, which says enough.
        let body = answer.bytes().await.unwrap_or_default();
        match read_error(&body) {
            Some(error) if status != StatusCode::UNAUTHORIZED || self.token.is_none() => CloudError::Api(error),
            error if status == StatusCode::UNAUTHORIZED => CloudError::Unauthorized {
                api_url: self.api_url.clone(),
                request_id: error.and_then(|error| error.request_id),
            },
            _ => self.unexpected(status.as_u16(), &excerpt(&body)),
        }
    }

    fn unexpected(&self, status: u16, excerpt: &str) -> CloudError {
        CloudError::Unexpected {
            api_url: self.api_url.clone(),
            status,
            excerpt: excerpt.chars().take(EXCERPT).collect(),
        }
    }
}

fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(body).chars().take(EXCERPT).collect()
}

/// The API's error; a code of a newer server than this client becomes `internal` and stays readable in the message.
fn read_error(body: &[u8]) -> Option<ApiError> {
    #[derive(serde::Deserialize)]
    struct Newer {
        error: NewerError,
    }
    #[derive(serde::Deserialize)]
    struct NewerError {
        code: String,
        message: String,
        hint: Option<String>,
        request_id: Option<RequestId>,
    }
    if let Ok(known) = serde_json::from_slice::<ErrorBody>(body) {
        return Some(known.error);
    }
    let Newer { error } = serde_json::from_slice(body).ok()?;
    let message = format!("{}: {}", error.code, error.message);
    let (hint, request_id) = (error.hint, error.request_id);
    Some(ApiError { hint, request_id, ..ApiError::new(ErrorCode::Internal, message) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_newer_server_stays_readable() {
        let body = br#"{"error":{"code":"moon_phase","message":"not tonight","hint":"wait"}}"#;
        let error = read_error(body).expect("an error");
        assert_eq!((error.message.as_str(), error.hint.as_deref()), ("moon_phase: not tonight", Some("wait")));
        assert!(read_error(b"<html>").is_none());
    }
}
