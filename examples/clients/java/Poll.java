import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import java.util.Optional;
import java.util.UUID;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Submits a file, and prints its finished report. The arguments are the site and the file. */
public final class Poll {
    private final HttpClient client = HttpClient.newHttpClient();
    private final String site;

    private Poll(String site) {
        this.site = site;
    }

    public static void main(String[] args) throws Exception {
        Poll poll = new Poll(args[0]);
        try {
            String report = poll.report(poll.submit(Path.of(args[1])));
            System.out.writeBytes(report.getBytes(StandardCharsets.UTF_8));
        } catch (IOException e) {
            System.err.println(e);
            System.exit(1);
        }
    }

    /** Submits a file, and returns the ID of the submission. */
    private String submit(Path file) throws IOException, InterruptedException {
        String boundary = UUID.randomUUID().toString();
        String name = file.getFileName().toString().replace("\"", "%22");
        HttpResponse<String> response = send(request("/submit")
            .header("Content-Type", "multipart/form-data; boundary=" + boundary)
            .POST(BodyPublishers.concat(
                BodyPublishers.ofString("--" + boundary + "\r\n"
                    + "Content-Disposition: form-data; name=\"file\"; filename=\"" + name + "\"\r\n\r\n"),
                BodyPublishers.ofFile(file),
                BodyPublishers.ofString("\r\n--" + boundary + "--\r\n"))));
        Matcher id = Pattern.compile("\"ID\"\\s*:\\s*\"([^\"]*)\"").matcher(response.body());
        if (response.statusCode() != 200 || !id.find()) {
            throw new IOException(response.statusCode() + ": " + response.body());
        }
        return id.group(1);
    }

    /** Returns the finished report of a submission. */
    private String report(String submitID) throws IOException, InterruptedException {
        Instant deadline = Instant.now().plusSeconds(600);
        while (true) {
            HttpResponse<String> response = send(request("/task?submitID=" + submitID + "&wait=30"));
            Optional<String> seconds = response.headers().firstValue("Retry-After");
            if (seconds.isEmpty() && response.statusCode() == 200) {
                return response.body();
            }
            if (seconds.isEmpty() || Instant.now().isAfter(deadline)) {
                throw new IOException(response.statusCode() + ": " + response.body());
            }
            Thread.sleep(Duration.ofSeconds(Long.parseLong(seconds.get())).toMillis());
        }
    }

    private HttpRequest.Builder request(String path) {
        return HttpRequest.newBuilder(URI.create(site + path))
            .header("Authorization", "Bearer " + System.getenv("FSBROKER_SECRET"))
            .timeout(Duration.ofSeconds(60)); // must be longer than the wait
    }

    private HttpResponse<String> send(HttpRequest.Builder request) throws IOException, InterruptedException {
        return client.send(request.build(), BodyHandlers.ofString());
    }
}
